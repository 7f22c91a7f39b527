"""Retrieval from long text: scripted models that find or guess, resume, refusals, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from evaluation_case import config, context, save_model, save_texts
from needle_case import POSITIONS, SMALL, Scripted, copying, guessing, prompts, rows
from pydantic import ValidationError
from source_models import make_source

from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.methods.evaluation import needle as needle_module
from posttrain.methods.evaluation.config import NeedleSettings
from posttrain.methods.evaluation.intervals import NO_DIFFERENCE, share_interval
from posttrain.methods.evaluation.needle import Measured, answer
from posttrain.methods.evaluation.prefix import Prefix, prefix_class
from posttrain.methods.evaluation.stage import Evaluate
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.stage import ArtifactMeta


def measured(model: Scripted, found: list, tmp_path: Path, **changes) -> dict:
    tokenizer, cfg = tiny_tokenizer(), NeedleSettings(**{**SMALL, **changes})
    reader = prefix_class("model", model)
    answers = [answer(reader, model, tokenizer, prompt, cfg.max_new_tokens, (257,)) for prompt in found]
    ctx = context(tmp_path, config(needle={**SMALL, **changes}))
    return Measured(found, {"model": answers}, ctx).figures()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("needle")
    return {
        "model": save_model(root / "model", seed=1, max_position_embeddings=POSITIONS),
        "baseline": save_model(root / "baseline", seed=2, max_position_embeddings=POSITIONS),
        "data": save_texts(root / "data", [row["text"] for row in rows()]),
    }


def run(work: Path, cfg, **inputs: Path) -> tuple[dict, Path]:
    ctx = context(work, cfg, **inputs)
    return (Evaluate().run(ctx), ctx.result)[1], work / "outputs" / "evaluation"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_model_that_copies_the_key_finds_it_everywhere(tmp_path: Path) -> None:
    model, found = Scripted(copying), prompts()
    figures = measured(model, found, tmp_path)
    for length in (460, 700):
        assert figures[f"needle_accuracy@{length}"] == figures[f"needle_choice@{length}"] == 1.0
        assert figures[f"needle_accuracy@{length}_low"] == pytest.approx(6 / (6 + 1.959964**2))
        assert -1e-5 < figures[f"needle_logprob@{length}"] <= 0
    assert figures["needle"]["chance"] == 0.25 and figures["needle"]["prompts"] == 6
    assert figures["needle"]["tokens"] == 6 * (448 + 688)
    assert set(figures["needle"]["by_depth"]["700"]) == {"0.00", "0.50", "1.00"}
    # A prompt is read once: besides there are candidates of 8 tokens, an answer of 12, and the probe.
    assert model.tokens_read < figures["needle"]["tokens"] + 12 * (4 * 7 + 12) + 100


def test_a_model_that_does_not_look_is_at_chance_by_likelihood_and_never_answers(tmp_path: Path) -> None:
    figures = measured(Scripted(guessing), prompts(lengths=[460], samples=80), tmp_path, lengths=[460], samples=80)
    assert figures["needle_accuracy@460"] == 0.0
    # 240 prompts, 1/4: three standard errors are 8.4 points.
    assert abs(figures["needle_choice@460"] - 0.25) < 0.084
    assert figures["needle_choice@460_low"] < 0.25 < figures["needle_choice@460_high"]
    assert figures["needle_logprob@460"] < -8


def test_a_tie_is_no_choice(tmp_path: Path) -> None:
    figures = measured(Scripted(lambda ids: torch.zeros(300)), prompts(), tmp_path)
    assert figures["needle_choice@460"] == 0.0
    assert figures["needle_logprob@460"] == pytest.approx(-8 * math.log(300))


def test_figures_are_those_of_the_file_and_differences_are_paired(folders, tmp_path: Path) -> None:
    result, folder = run(tmp_path, config(needle=SMALL), **folders)
    found = lines(folder / "needle.jsonl")
    assert len(found) == 12 and {one["length"] for one in found} == {460, 700}
    assert all(one["key_tokens"] == 8 for one in found)
    for length in (460, 700):
        own = [one for one in found if one["length"] == length]
        for figure in ("accuracy", "choice", "logprob"):
            means = {name: sum(one[name][figure] for one in own) / 6 for name in ("model", "baseline")}
            assert result[f"needle_{figure}@{length}"] == pytest.approx(means["model"])
            assert result[f"baseline_needle_{figure}@{length}"] == pytest.approx(means["baseline"])
            difference = means["model"] - means["baseline"]
            assert result[f"difference_needle_{figure}@{length}"] == pytest.approx(difference)
            assert f"difference_needle_{figure}@{length}_verdict" in result
        low, high = (result[f"needle_logprob@{length}_{end}"] for end in ("low", "high"))
        assert low < result[f"needle_logprob@{length}"] < high < 0
    middle = [one["model"]["logprob"] for one in found if one["length"] == 700 and one["depth"] == 0.5]
    detail = result["needle"]
    assert detail["by_depth"]["700"]["0.50"]["model"]["logprob"] == pytest.approx(sum(middle) / 2)
    assert detail["settings"] == NeedleSettings(**SMALL).model_dump(mode="json")
    assert detail["models"] == ["model", "baseline"] and detail["tokens"] == 2 * 6 * (448 + 688)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["needle"] == detail and metrics["needle_choice@460"] == result["needle_choice@460"]


def test_a_model_against_itself_has_no_difference(folders, tmp_path: Path) -> None:
    result, _ = run(tmp_path, config(needle=SMALL), **{**folders, "baseline": folders["model"]})
    assert result["difference_needle_logprob@460"] == 0.0
    assert result["difference_needle_logprob@460_verdict"] == NO_DIFFERENCE
    alone, _ = run(tmp_path / "alone", config(needle=SMALL), model=folders["model"], data=folders["data"])
    assert alone["needle_logprob@460"] == result["needle_logprob@460"]
    assert not [name for name in alone if name.startswith(("difference", "baseline"))]


def test_a_second_run_and_a_resumed_one_are_bit_equal(folders, tmp_path: Path, monkeypatch) -> None:
    cfg = config(needle=SMALL)
    undisturbed, _ = run(tmp_path / "a", cfg, **folders)
    ctx = context(tmp_path / "b", cfg, **folders)
    stop = tmp_path / "b" / "STOP"
    ctx.progress = lambda done, total, unit="", **_: stop.touch() if (done, total) == (5, 12) else None
    with pytest.raises(StopRequested) as stopped:
        Evaluate().run(ctx)
    assert stopped.value.step == 5
    partial = tmp_path / "b" / "needle_model.jsonl"
    assert len(lines(partial)) == 5 and not (tmp_path / "b" / "needle_baseline.jsonl").exists()
    with partial.open("a") as file:
        file.write('{"batch": 5, "ans')
    stop.unlink()
    asked = []
    monkeypatch.setattr(needle_module, "answer", lambda *given: (asked.append(given[3].sample), answer(*given))[1])
    assert run(tmp_path / "b", cfg, **folders)[0] == undisturbed
    assert len(asked) == 12 - 5 + 12
    for name in ("metrics.json", "needle.jsonl"):
        files = [tmp_path / side / "outputs" / "evaluation" / name for side in ("a", "b")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_the_stage_runs_a_hybrid_against_its_source(folders, tmp_path: Path) -> None:
    from posttrain.methods.hybrid_ssm import hybridize
    from posttrain.models.loading import load_model, load_tokenizer
    from posttrain.models.loading import save_model as save

    hybrid = hybridize(load_model(folders["model"]), ["mamba2", "full_attention"])
    save(hybrid, load_tokenizer(folders["model"]), tmp_path / "hybrid")
    inputs = {"model": tmp_path / "hybrid", "baseline": folders["model"], "data": folders["data"]}
    result, _ = run(tmp_path / "work", config(needle={**SMALL, "lengths": [460]}, precision="bf16"), **inputs)
    assert math.isfinite(result["difference_needle_logprob@460"]) and result["needle"]["prompts"] == 6


def test_what_does_not_fit_is_refused_when_it_runs(folders, tmp_path: Path) -> None:
    inputs = {"model": folders["model"], "data": folders["data"]}
    for changes, says in (
        ({"lengths": [460, 1025]}, "a prompt of 1025 tokens exceeds the 1024 positions"),
        ({"lengths": [100]}, r"a length of 100 tokens has no text: question and answer take \d+"),
        ({"max_new_tokens": 7}, "a key is up to 8 tokens long, an answer at most 7"),
    ):
        with pytest.raises(StageError, match=says) as refused:
            run(tmp_path / says[:9], config(needle={**SMALL, **changes}), **inputs)
        assert refused.value.problems[0].where.endswith(f"needle.{next(iter(changes))}")
    little = save_texts(tmp_path / "little", ["One sentence. Another.", "A third one."])
    with pytest.raises(StageError, match=r"the data has 36 tokens of text; \d+ are needed beside the question"):
        run(tmp_path / "w", config(needle=SMALL), model=folders["model"], data=little)


def test_a_model_that_gives_nan_is_refused(folders, tmp_path: Path) -> None:
    broken = Scripted(lambda ids: torch.full((300,), math.nan))
    with pytest.raises(StageError, match="not a finite number"):
        answer(Prefix, broken, tiny_tokenizer(), prompts()[0], 12, (257,))


def architecture(positions: int) -> dict:
    from posttrain.models.architecture import normalise

    return normalise(make_source("llama", max_position_embeddings=positions).config.to_dict())


def metas(positions: int = POSITIONS, **more: int) -> dict[str, ArtifactMeta]:
    found = {"model": ArtifactMeta("model", architecture(positions)), "data": ArtifactMeta("dataset", rows=9)}
    return found | {name: ArtifactMeta("model", architecture(value)) for name, value in more.items()}


def test_a_plan_refuses_lengths_beyond_the_positions_and_says_what_fits() -> None:
    from posttrain.pipeline.graph import in_section

    cfg = config(needle={"lengths": [2048, 512, 8192]})
    with pytest.raises(RecipeError) as error:
        Evaluate().check(cfg, metas(2048))
    found = in_section(error.value.problems, Evaluate(), "evaluate")[0]
    assert found.where == "stages.evaluate.needle.lengths"
    assert "8192 tokens exceeds the 2048 positions" in found.what
    assert found.fix.startswith("stages.evaluate.needle.lengths=[512,2048],")
    with pytest.raises(RecipeError, match=r"needle.lengths=\[400\]"):
        Evaluate().check(cfg, metas(8192, baseline=400))
    Evaluate().check(cfg, metas(8192, baseline=8192))
    Evaluate().check(cfg, {"model": ArtifactMeta("model"), "data": ArtifactMeta("dataset", rows=9)})
    Evaluate().check(config(), metas(400))


def test_the_estimate_counts_prompts_and_the_longest_cache_twice() -> None:
    both = metas(baseline=POSITIONS)
    plain, asked = (Evaluate().estimate(config(needle=needle), both) for needle in (None, SMALL))
    assert asked.tokens - plain.tokens == 2 * 6 * (448 + 688)
    assert asked.memory["cache"] == 2 * 700 * 2 * 2 * 2 * 16 * 4
    logits = 3 * 4 * 12 * architecture(POSITIONS)["vocab_size"]  # three copies in fp32, as long as an answer may be
    assert asked.memory["candidates"] == 4 * (700 * 2 * 2 * 2 * 16 * 4 + logits) and "candidates" not in plain.memory
    assert asked.memory["activations"] == 700 * 4 * (4 * 64 + 3 * 96)
    assert plain.memory["cache"] < asked.memory["cache"] and plain.memory["activations"] < asked.memory["activations"]


def test_the_key_has_a_needle_only_where_there_is_one() -> None:
    assert "needle" not in config().key_fields()
    keys = [config(needle=needle).key_fields()["needle"] for needle in ({}, SMALL, {"seed": 1}, {"key": "code"})]
    assert len({json.dumps(key) for key in keys}) == 4
    assert "problems" not in config(needle={}).key_fields()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": []}, "at least 1 item"),
        ({"lengths": [20]}, "a length of 20 tokens has no room beside 24 new ones"),
        ({"candidates": 1}, "greater than or equal to 2"),
        ({"key": "uuid"}, "'number', 'phrase' or 'code'"),
        ({"depth": 3}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_fit(fields, message) -> None:
    with pytest.raises(ValidationError, match=message):
        NeedleSettings(**fields)


def test_defaults_and_depths() -> None:
    cfg = NeedleSettings()
    assert (cfg.lengths, cfg.prompts, cfg.candidates, cfg.key) == ((2048, 8192), 20, 16, "number")
    assert cfg.places() == (0, 0.25, 0.5, 0.75, 1) and NeedleSettings(depths=1).places() == (0.5,)
    assert NeedleSettings(lengths=[900, 300, 900]).lengths == (300, 900)


def test_wilsons_interval() -> None:
    """Values of R's binom.confint(methods = "wilson")."""
    for right, count, low, high in ((0, 20, 0.0, 0.1611252), (20, 20, 0.8388748, 1.0), (7, 20, 0.1811918, 0.5671457)):
        found = share_interval("x", [True] * right + [False] * (count - right))
        assert found["x"] == right / count
        assert (found["x_low"], found["x_high"]) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
