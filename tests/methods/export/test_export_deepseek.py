"""What an export holds beside its logits (test_export_card.py): padded ranks, native code, tokens, certificate."""

from __future__ import annotations

import json

import pytest
import torch
from methods.export.export_world import convert, export, save
from source_models import make_source

from posttrain.data.documents import Document, write_dataset
from posttrain.errors import RecipeError, StageError
from posttrain.methods.export import deepseek, verify
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.write import Given
from posttrain.models.loading import save_model
from posttrain.models.tiny import tiny_tokenizer
from posttrain.models.upcycled import UpcycledConfig, UpcycledForCausalLM


def test_native_loads_and_generates_without_this_package(tmp_path) -> None:
    certificate = export(save(tmp_path), to="native")
    assert certificate["class"] == "UpcycledForCausalLM" and "vLLM" in certificate["servers"]
    assert certificate["generation"]["equal"] and certificate["generation"]["tokens"] == 64
    assert [step["exact"] for step in certificate["steps"]] == [True, True, True]
    assert certificate["latent_norm_eps"] is None and certificate["caveats"] == {}


def test_a_plain_model_passes_through(tmp_path) -> None:
    plain = save_model(make_source("mistral"), tiny_tokenizer(), tmp_path / "native")
    certificate = export(plain, to="native")
    assert certificate["class"] == "MistralForCausalLM" and certificate["layers"] is None


def test_other_greedy_tokens_in_the_new_process_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(verify, "compare_generated", lambda *_: {"tokens": 64, "equal": False, "tie": False})
    with pytest.raises(StageError, match="greedy tokens with the cache differ"):
        export(save(tmp_path))
    assert not list((tmp_path / "export").iterdir())


def test_another_tokenizer_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(verify, "PROBE", verify.PROBE.replace("tokenizer(text)", "tokenizer(text + 'x')"))
    with pytest.raises(StageError, match="gives other tokens"):
        export(save(tmp_path))


def test_a_greedy_tie_is_no_difference() -> None:
    _, model = convert()
    ids = verify.prompt_ids(300, 0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **verify.greedy())
    assert verify.compare_generated(model, ids, found, 1e-5) == {"tokens": 64, "equal": True, "tie": False}
    other = found.clone()
    other[0, -1] = (other[0, -1] + 1) % 300
    assert not verify.compare_generated(model, ids, other, 1e-5)["tie"]
    assert verify.compare_generated(model, ids, other, 10.0)["tie"]


def test_bf16_weights_have_their_floor_measured(tmp_path) -> None:
    certificate = export(save(tmp_path, dtype=torch.bfloat16))
    stored = certificate["steps"][-1]
    assert certificate["dtype"] == "bfloat16" and not stored["exact"] and 1e-4 < stored["relative"] < 0.1
    assert certificate["cache_bytes_per_token"] == {"predicted": 96, "measured": 96, "model": 96}
    # Stock classes have norms on their latents, 16 weights in each of two layers.
    parameters = certificate["parameters"]
    assert parameters["measured"] == parameters["predicted"] == parameters["model"] + 2 * 16


def test_ranks_per_layer_and_query_ranks_are_padded_exactly() -> None:
    fields = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12, "rms_norm_eps": 1e-6}
    ranks = {"kv_lora_rank": [16, 24], "q_lora_rank": [20, 12]}
    config = UpcycledConfig.from_source(make_source().config, mixers=["latent_attention"] * 2, **fields, **ranks)
    torch.manual_seed(0)
    model = UpcycledForCausalLM(config).eval()
    with pytest.raises(RecipeError, match="differs from layer to layer"):
        deepseek.to_deepseek(model, ExportConfig(to="deepseek_v3"))
    stock = deepseek.to_deepseek(model, ExportConfig(to="deepseek_v3", pad_ranks=True))
    ids = verify.prompt_ids(300, 1)
    with torch.no_grad():
        assert verify.errors(model(ids).logits, stock(ids).logits)["relative"] <= 1e-5


def test_padded_ranks_cost_what_the_certificate_says(tmp_path) -> None:
    native = save(tmp_path, settings={"kv_lora_rank": None, "bytes_per_token": 98, "rank_multiple": 1})
    certificate = export(native, pad_ranks=True)
    ranks = [layer["kv_lora_rank"] for layer in certificate["layers"]]
    assert len(set(ranks)) == 2
    bytes_now = 4 * 2 * (max(ranks) + 8)
    own = 4 * sum(rank + 8 for rank in ranks)
    assert certificate["cache_bytes_per_token"] == {"predicted": bytes_now, "measured": bytes_now, "model": own}
    assert certificate["parameters"]["measured"] == certificate["parameters"]["predicted"]


def test_the_certificate_holds_predicted_and_measured_errors_and_perplexities(tmp_path) -> None:
    source, model = convert()
    native = save_model(model, tiny_tokenizer(), tmp_path / "native")
    plain = save_model(source, tiny_tokenizer(), tmp_path / "source")
    (tmp_path / "conversion").mkdir()
    first = {"key_error": 0.5, "value_error": 0.25, "rel_error": 0.75}
    report = {"layers": [{**first, "alpha": 2.0}, {"key_error": 0.125, "value_error": 0.0, "rel_error": 0.0}]}
    (tmp_path / "conversion" / "conversion.json").write_text(json.dumps(report))
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", [Document(str(n), "a cat sat on a mat, and then it left. " * 4) for n in range(3)])
    given = Given(conversion=tmp_path / "conversion", source=plain, data=tmp_path / "data")
    found = export(native, given, max_documents=2, max_tokens=64)
    assert found["layers"][0]["predicted"] == first
    assert [layer["kv_lora_rank"] for layer in found["layers"]] == [16, 16]
    errors = [layer["measured"]["output_error"] for layer in found["layers"]]
    assert all(0.05 < error < 2 for error in errors)
    measured = found["measured"]
    assert measured["documents"] == 2 and measured["tokens"] == 2 * 63
    assert measured["perplexity"]["export"] == pytest.approx(measured["perplexity"]["native"], rel=1e-5)
    assert found["perplexity"] == measured["perplexity"]["export"] != measured["perplexity"]["source"]
    assert abs(measured["kl_to_export"]["native"]) < 1e-6 < measured["kl_to_export"]["source"]


def test_a_layer_of_full_rank_has_no_measured_error() -> None:
    """One KV head that keeps its whole rotary key: attention is the source's."""
    from posttrain.methods.export.measure import layer_errors

    settings = {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "rotary_pairs": None, "rotary_plan": "paired"}
    source, model = convert(settings=settings, num_key_value_heads=1)
    assert max(layer_errors(source, model, None, None, ExportConfig())) < 1e-4
