"""The whole stage on tiny models: figures, cache bytes, resume, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from evaluation_case import config, context, random_texts, save_model, save_texts
from transformers import AutoModelForCausalLM

from posttrain.config import load_recipe
from posttrain.errors import PosttrainError, RecipeError, StopRequested
from posttrain.methods.evaluation.stage import Evaluate
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.stage import ArtifactMeta


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("evaluation")
    return {
        "model": save_model(root / "model", seed=1),
        "baseline": save_model(root / "baseline", seed=2),
        "data": save_texts(root / "data", random_texts()),
    }


def run(work_dir: Path, cfg, **inputs: Path) -> dict:
    ctx = context(work_dir, cfg, **inputs)
    Evaluate().run(ctx)
    return ctx.result


def rows_of(work_dir: Path) -> list[dict]:
    path = work_dir / "outputs" / "evaluation" / "documents.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reference_nll(folder: Path, text: str, window: int, windows: int) -> tuple[float, int, int]:
    """Nats, scored tokens and scored bytes of one document in double precision, full logits, no cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    nll, tokens, size = 0.0, 0, 0
    for start in range(0, min(len(ids), window * windows), window):
        part = ids[start : min(start + window, window * windows)]
        if len(part) < 2:
            continue
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([part])).logits[0].double(), -1)
        nll -= sum(log_p[i, part[i + 1]].item() for i in range(len(part) - 1))
        tokens += len(part) - 1
        size += len(tokenizer.decode(part, skip_special_tokens=True).encode())
        size -= len(tokenizer.decode(part[:1], skip_special_tokens=True).encode())
    return nll, tokens, size


def test_figures_equal_a_double_precision_reference(folders, tmp_path: Path) -> None:
    result = run(tmp_path, config(), **folders)
    expected = [reference_nll(folders["model"], text, 40, 3) for text in random_texts()]
    for row, (nll, tokens, size) in zip(rows_of(tmp_path), expected, strict=True):
        assert (row["tokens"], row["bytes"]) == (tokens, size)
        assert row["nll"] == pytest.approx(nll, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    nll, tokens, size = (sum(column) for column in zip(*expected, strict=True))
    assert result["tokens"] == tokens and result["documents"] == len(expected)
    assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert result["kl"] > 0.01 and result["top1_agreement"] < 1


def test_a_model_against_itself_loses_nothing(folders, tmp_path: Path) -> None:
    result = run(tmp_path, config(), model=folders["model"], baseline=folders["model"], data=folders["data"])
    assert result["kl"] == 0.0 and result["top1_agreement"] == 1.0 and result["nll_gap"] == 0.0
    assert result["perplexity"] == result["baseline_perplexity"]


def test_the_chunk_size_does_not_change_the_figures(folders, tmp_path: Path) -> None:
    small = run(tmp_path / "small", config(chunk_tokens=3), **folders)
    large = run(tmp_path / "large", config(chunk_tokens=4096), **folders)
    for name, value in large.items():
        assert small[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cache_bytes_measured_equal_predicted(family: str, precision: str, folders, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    result = run(tmp_path / "work", config(precision=precision, max_windows=1), model=model, data=folders["data"])
    # 2 layers, keys and values, 2 KV heads of 16.
    expected = 2 * 2 * 2 * 16 * {"fp32": 4, "bf16": 2}[precision]
    assert result["kv_bytes_per_token_measured"] == result["kv_bytes_per_token_predicted"] == expected
    assert result["kv_constant_bytes"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_constant_states_are_measured_and_both_ratios_told(precision: str, folders, tmp_path: Path) -> None:
    from posttrain.methods.hybrid_ssm import hybridize
    from posttrain.models.loading import load_model, load_tokenizer
    from posttrain.models.loading import save_model as save

    source = save_model(tmp_path / "source", "llama")
    hybrid = hybridize(load_model(source), ["mamba2", "full_attention"])
    save(hybrid, load_tokenizer(source), tmp_path / "model")
    cfg = config(precision=precision, max_windows=1)
    result = run(tmp_path / "work", cfg, model=tmp_path / "model", baseline=source, data=folders["data"])
    size = {"fp32": 4, "bf16": 2}[precision]
    # One layer of 4 heads of 16: 4·16² elements of state in fp32, 4 columns of (4 + 2·2)·16 channels.
    assert result["kv_constant_bytes"] == result["kv_constant_bytes_predicted"] == 4 * 16**2 * 4 + 4 * 8 * 16 * size
    assert result["kv_bytes_per_token_measured"] == result["kv_bytes_per_token_predicted"] == 2 * 2 * 16 * size
    assert result["cache_ratio_without_states"] == 0.5
    for length, ratio in result["cache_ratio_with_states"].items():
        plain = 2 * 2 * 2 * 16 * size * int(length)  # two layers, keys and values of 2 heads of 16
        assert ratio == pytest.approx(0.5 + result["kv_constant_bytes"] / plain, rel=1e-12)
    assert list(result["cache_ratio_with_states"]) == ["2048", "8192", "32768", "131072"]
    assert result["baseline_kv_constant_bytes"] == result["baseline_kv_constant_bytes_predicted"] == 0
    assert result["baseline_cache_ratio_without_states"] == 1
    assert set(result["baseline_cache_ratio_with_states"].values()) == {1}
    metrics = json.loads((tmp_path / "work" / "outputs" / "evaluation" / "metrics.json").read_text())
    assert metrics["cache_ratio_with_states"] == result["cache_ratio_with_states"]


def test_models_without_states_have_no_ratios(folders, tmp_path: Path) -> None:
    result = run(tmp_path, config(max_windows=1), **folders)
    assert not [name for name in result if "states" in name or name.endswith("kv_constant_bytes_predicted")]


def test_a_second_run_and_a_resumed_one_are_bit_equal(folders, tmp_path: Path) -> None:
    cfg = config(prompts=["Hello", "A longer prompt"], generate_tokens=4)
    undisturbed = run(tmp_path / "a", cfg, **folders)

    ctx = context(tmp_path / "b", cfg, **folders)
    stop = tmp_path / "b" / "STOP"
    ctx.progress = lambda done, total, **_: stop.touch() if done == 2 else None
    with pytest.raises(StopRequested) as stopped:
        Evaluate().run(ctx)
    assert stopped.value.step == 2
    partial = tmp_path / "b" / "partial.jsonl"
    assert len(partial.read_text().splitlines()) == 2
    # A kill inside a write leaves half a line.
    with partial.open("a") as file:
        file.write('{"index": 2, "tok')
    stop.unlink()

    assert run(tmp_path / "b", cfg, **folders) == undisturbed
    for name in ("metrics.json", "documents.jsonl", "samples.json"):
        files = [tmp_path / side / "outputs" / "evaluation" / name for side in ("a", "b")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_finished_documents_are_not_scored_again(folders, tmp_path: Path) -> None:
    run(tmp_path, config(), **folders)
    partial = tmp_path / "partial.jsonl"
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    rows[0]["nll"] += 1000.0
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, config(), **folders)
    assert rows_of(tmp_path)[0]["nll"] == rows[0]["nll"]


def test_samples_hold_both_models_and_speed_is_a_timing(folders, tmp_path: Path) -> None:
    ctx = context(
        tmp_path, config(prompts=["Hi"], generate_tokens=3, repeats=1, prefill_tokens=8, decode_tokens=2), **folders
    )
    folder = Evaluate().run(ctx)["evaluation"]
    samples = json.loads((folder / "samples.json").read_text())
    assert [set(sample) for sample in samples] == [{"prompt", "model", "baseline"}]
    for prefix in ("", "baseline_"):
        assert (
            ctx.timing[f"{prefix}prefill_tokens_per_second"] > 0 and ctx.timing[f"{prefix}decode_tokens_per_second"] > 0
        )
    assert not set(ctx.timing) & set(ctx.result)


def test_windows_never_exceed_the_models_positions(folders, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=24)
    result = run(tmp_path / "work", config(repeats=1), model=model, data=folders["data"])
    assert result["window_tokens"] == 24


def test_too_little_data_is_refused(folders, tmp_path: Path) -> None:
    data = save_texts(tmp_path / "data", ["only one document", ""])
    with pytest.raises(PosttrainError, match="1 documents"):
        run(tmp_path / "work", config(), model=folders["model"], data=data)


def test_a_model_that_gives_nan_is_refused(folders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["model"])
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(PosttrainError, match="not a finite number"):
        run(tmp_path / "work", config(), model=tmp_path / "model", data=folders["data"])


@pytest.mark.parametrize("rows", [0, 1])
def test_check_refuses_empty_and_one_line_data(rows: int) -> None:
    with pytest.raises(RecipeError, match="at least 2"):
        Evaluate().check(config(), {"model": ArtifactMeta("model"), "data": ArtifactMeta("dataset", rows=rows)})


def test_check_refuses_another_tokenizer_and_another_vocabulary() -> None:
    data = ArtifactMeta("dataset", rows=9)
    model = ArtifactMeta("model", {"vocab_size": 5}, tokenizer="a" * 64)
    for other, message in (
        (ArtifactMeta("model", {"vocab_size": 5}, tokenizer="b" * 64), "different tokenizers"),
        (ArtifactMeta("model", {"vocab_size": 6}), "vocabularies of 5 and 6"),
    ):
        with pytest.raises(RecipeError, match=message):
            Evaluate().check(config(), {"model": model, "baseline": other, "data": data})
    Evaluate().check(config(), {"model": model, "baseline": model, "data": data})


def test_the_estimate_counts_both_models() -> None:
    from posttrain.models.architecture import normalise

    arch = normalise(
        {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
    )
    metas = {"model": ArtifactMeta("model", arch), "data": ArtifactMeta("dataset", rows=7)}
    alone = Evaluate().estimate(config(max_windows=1), metas)
    both = Evaluate().estimate(config(max_windows=1), {**metas, "baseline": metas["model"]})
    assert (alone.tokens, both.tokens) == (7 * 32, 2 * 7 * 32)
    assert both.memory["baseline weights"] == both.memory["weights"] == 4 * both.parameters
    assert alone.cache_bytes_per_token == 2 * 2 * 2 * 16 * 2, "the plan counts elements of two bytes"
    assert "32 tokens" in alone.notes[0]


def test_what_an_interrupted_attempt_left_is_gone(folders, tmp_path: Path) -> None:
    left = context(tmp_path / "work", config()).output_dir("evaluation")
    (left / "half.jsonl").write_text("{")
    run(tmp_path / "work", config(max_documents=2), model=folders["model"], data=folders["data"])
    assert {path.name for path in left.iterdir()} == {"metrics.json", "documents.jsonl", "samples.json"}


def test_how_the_work_is_done_is_not_in_the_key() -> None:
    assert config(chunk_tokens=8).key_fields() == config(chunk_tokens=9).key_fields()
    assert config(max_tokens=8).key_fields() != config(max_tokens=9).key_fields()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_latent_cache_measures_as_predicted(precision: str, folders, tmp_path: Path) -> None:
    from posttrain.methods.mla_upcycling import upcycle
    from posttrain.models.loading import load_model, load_tokenizer, save_model

    source = load_model(folders["baseline"])
    converted, _ = upcycle(source, {"kv_lora_rank": 24, "qk_rope_head_dim": 8})
    save_model(converted, load_tokenizer(folders["baseline"]), tmp_path / "mla")
    cfg = config(precision=precision, prompts=["a", "a longer one"], generate_tokens=4, repeats=1, prefill_tokens=8)
    inputs = {"model": tmp_path / "mla", "baseline": folders["baseline"], "data": folders["data"]}
    result = run(tmp_path / "work", cfg, **inputs)
    size = {"fp32": 4, "bf16": 2}[precision]
    assert result["kv_bytes_per_token_measured"] == result["kv_bytes_per_token_predicted"] == 2 * (24 + 8) * size
    assert result["baseline_kv_bytes_per_token_measured"] == 2 * 2 * 2 * 16 * size
    assert result["kv_constant_bytes"] == 0 and math.isfinite(result["kl"])


def test_refusals_stand_where_the_recipe_has_the_setting(tmp_path) -> None:
    """They stood at "problems of an evaluate stage", of which a recipe may have several."""
    rows = tmp_path / "x.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(8)))
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe("grpo", ["scale=smoke", f"datasets.problems.path={rows}"]), outputs=tmp_path)
    told = [problem for problem in caught.value.problems if "reward gym can score" in problem.what]
    assert len(told) == 2 and len({problem.where for problem in told}) == 2
    assert all("grpo.yaml:" in problem.where for problem in told)


def test_the_plan_warns_of_training_data_and_of_a_model_as_its_own_baseline(tmp_path) -> None:
    swapped = ["stages.evaluate.inputs.data=data.train", "stages.evaluate.inputs.baseline=prefer"]
    plan = make_plan(load_recipe("x_ecomla", ["scale=smoke", *swapped]), outputs=tmp_path)
    trained, own = plan["evaluate"].estimate.notes
    assert trained.startswith("data.train is what is trained on")
    assert own.startswith("prefer is its own baseline")
    assert plan["evaluate_converted"].estimate.notes == ()
