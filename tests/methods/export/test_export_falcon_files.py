"""Whole exports as FalconH1: files, certificate, plan, and what is refused while it is checked in a new process."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from methods.export.export_world import export
from models.hybrid_models import make_hybrid
from safetensors.torch import load_file
from source_models import make_source

from posttrain.data.documents import Document, write_dataset
from posttrain.errors import RecipeError, StageError
from posttrain.launch.execute import measure
from posttrain.methods.export import falcon, write
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.falcon import to_falcon
from posttrain.methods.export.program import main
from posttrain.methods.export.stage import Export
from posttrain.methods.export.write import Given
from posttrain.models.inspect import model_meta
from posttrain.models.loading import save_model
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.report.cache_note import with_states

MIXED = ("mamba2", "full_attention", "mamba2")
batches = pytest.mark.skipif(
    not falcon.decodes_batches(), reason="this transformers decodes batches of a FalconH1 with a norm wrongly"
)


def save(folder, mixers=MIXED, dtype=None, **fields):
    return save_model(make_hybrid(mixers, **fields), tiny_tokenizer(), folder / "native", dtype=dtype)


@batches
def test_the_certificate_of_a_hybrid(tmp_path) -> None:
    source = save_model(
        make_source(num_hidden_layers=3, num_attention_heads=8, head_dim=8), tiny_tokenizer(), tmp_path / "source"
    )
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", [Document(str(n), "a cat sat on a mat, and then it left. " * 4) for n in range(2)])
    given = Given(source=source, data=tmp_path / "data")
    found = export(save(tmp_path), given, to="falcon_h1", max_tokens=64)
    assert found["class"] == "FalconH1ForCausalLM" and found["loader"] == "transformers"
    assert [step["exact"] for step in found["steps"]] == [True] * 4
    assert all(step["relative"] <= found["tolerance"] == 1e-5 for step in found["steps"])
    assert found["generation"]["equal"] and found["tokenizer"]["equal"]
    assert [layer["mixer"] for layer in found["layers"]] == list(MIXED)
    errors = [layer["measured"]["output_error"] for layer in found["layers"]]
    assert errors[1] < 1e-5 and errors[0] > 0.1 and errors[2] > 0.1
    perplexity = found["measured"]["perplexity"]
    assert perplexity["export"] == pytest.approx(perplexity["native"], rel=1e-5) != perplexity["source"]
    assert abs(found["measured"]["kl_to_export"]["native"]) < 1e-6
    assert "vLLM" in found["servers"] and "no server was tried" in found["servers"]


@batches
def test_what_the_stock_classes_hold_is_predicted(tmp_path) -> None:
    """D 64, H 8, G 2, d_h 8, K 4, three layers, fp32: keys and states in every layer, 3·H·d_h channels."""
    found = export(save(tmp_path), to="falcon_h1")
    assert found["cache_bytes_per_token"] == {"predicted": 3 * 32 * 4, "measured": 3 * 32 * 4, "model": 32 * 4}
    state, columns, shared = 8 * 64 * 4, 4 * 192 * 4, 4 * (64 + 2 * 16) * 4
    constant = 3 * (state + columns)
    assert found["cache_state_bytes"] == {"predicted": constant, "measured": constant, "model": 2 * (state + shared)}
    parameters = found["parameters"]
    assert parameters["predicted"] == parameters["measured"] > parameters["model"]
    mixer = 64 * (4 * 64 + 8) + 64 * 64 + 5 * 192 + 3 * 8 + 64
    attention = 64 * (64 + 2 * 16) + 64 * 64
    repeated = 2 * (8 - 2) * 8 * 64 + 5 * 2 * (8 - 2) * 8
    assert parameters["measured"] - parameters["model"] == 2 * (attention + repeated) + mixer


@batches
def test_states_alone_in_bf16_with_decays_in_fp32(tmp_path) -> None:
    found = export(save(tmp_path, ("mamba2", "mamba2"), torch.bfloat16), to="falcon_h1")
    assert found["dtype"] == "bfloat16" and found["generation"]["equal"]
    stored, loaded = found["steps"][-2:]
    assert stored["name"] == "stored weights" and stored["relative"] <= 1e-5  # they were bf16 before
    assert loaded["name"] == "decays as loaded" and not loaded["exact"] and 1e-4 < loaded["relative"] < 0.1
    assert found["cache_bytes_per_token"] == {"predicted": 2 * 16 * 2, "measured": 2 * 16 * 2, "model": 0}
    constant = 2 * (8 * 64 * 4 + 4 * 192 * 2)  # states in fp32, columns in bf16
    assert found["cache_state_bytes"]["predicted"] == found["cache_state_bytes"]["measured"] == constant
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert kept == {f"model.layers.{n}.mamba.{name}" for n in range(2) for name in ("A_log", "D", "dt_bias")}
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["model_type"] == "falcon_h1" and "auto_map" not in config
    assert config["mamba_n_groups"] == 8 and config["num_key_value_heads"] == 1


@batches
def test_the_command_writes_the_folder_and_its_card(tmp_path, capsys) -> None:
    assert main([str(save(tmp_path)), str(tmp_path / "out"), '{"to": "falcon_h1"}']) == 0
    assert "unused halves zero: relative logit error" in capsys.readouterr().err
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "FalconH1ForCausalLM" in readme and "trust_remote_code" not in readme
    assert "KV cache per token: 384 B predicted, 384 measured, 128 B before the export" in readme
    assert "States and convolution columns per sequence: 15,360 B predicted" in readme


def test_a_transformers_that_decodes_batches_wrongly_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(falcon, "decodes_batches", lambda: False)
    with pytest.raises(StageError, match="install transformers 5.23 or newer"):
        export(save(tmp_path), to="falcon_h1")
    assert not list((tmp_path / "export").iterdir())
    falcon.check_installed(make_hybrid(MIXED, mamba_norm=False).config)


def test_a_gate_behind_the_norm_is_noticed_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(falcon, "decodes_batches", lambda: True)
    made = falcon._config

    def swapped(*args):
        config = made(*args)
        config.mamba_norm_before_gate = True
        return config

    monkeypatch.setattr(falcon, "_config", swapped)
    with pytest.raises(StageError, match="layout: shared rows .* logits are off"):
        export(save(tmp_path), to="falcon_h1")
    assert not list((tmp_path / "export").iterdir())


def test_a_bias_of_in_proj_would_be_seen_in_left_padded_batches_alone(tmp_path, monkeypatch) -> None:
    """Without norm, so that every version of transformers comes this far."""
    for module in (write, falcon):
        monkeypatch.setattr(module, "obstacles", lambda *_: [])
    with pytest.raises(StageError, match="left-padded batch, then decoding, new process: logits are off"):
        export(save(tmp_path, mamba_bias=True, mamba_norm=False), to="falcon_h1")


def test_the_plan_says_what_the_stock_classes_cost(tmp_path) -> None:
    meta, cfg = model_meta(save(tmp_path)), ExportConfig(to="falcon_h1", dtype="bfloat16")
    Export().check(cfg, {"model": meta})
    described = Export().describe(cfg, {"model": meta})
    assert described["model"].architecture is None and described["model"].extra["dtype"] == "bfloat16"
    native, stock = (Export().estimate(c, {"model": meta}) for c in (ExportConfig(dtype="bfloat16"), cfg))
    assert native.cache_bytes_per_token == 32 * 2 and stock.cache_bytes_per_token == 3 * 32 * 2
    assert stock.cache_state_bytes == 3 * (8 * 64 * 4 + 4 * 192 * 2)
    assert with_states(stock, described, {"model": meta}) == stock
    more = stock.parameters - native.parameters
    assert stock.disk_bytes == 2 * stock.parameters and f"{more:,} parameters more" in stock.notes[0]
    assert stock.memory == {"model": 4 * native.parameters, "exports": 8 * stock.parameters}


def test_a_run_takes_the_folder_of_other_classes_and_looks_at_its_weights(tmp_path) -> None:
    cfg, meta = ExportConfig(to="falcon_h1"), model_meta(save(tmp_path))
    folder = save_model(to_falcon(make_hybrid(MIXED)), tiny_tokenizer(), tmp_path / "stock")
    predicted = Export().describe(cfg, {"model": meta})["model"]
    assert predicted.extra["stock"] == "falcon_h1"

    def measured(prediction: ArtifactMeta) -> ArtifactMeta:
        job = SimpleNamespace(stage="export", predicted={"model": prediction.to_json()})
        return measure(Export(), job, "model", folder)

    assert measured(predicted) == predicted
    with pytest.raises(RecipeError, match="unsupported architecture: model_type 'falcon_h1'"):
        measured(replace(predicted, extra={}))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(RecipeError, match="truncated"):
        measured(predicted)


@pytest.mark.parametrize(
    ("fields", "settings", "said"),
    [
        ({"family": "qwen2"}, {}, "in_proj has a bias"),
        ({}, {"loader": "vllm"}, "a falcon_h1 is the same for every loader"),
        ({"mamba_conv_activation": False}, {}, "init=aligned"),
    ],
)
def test_the_plan_refuses_with_the_reason(tmp_path, fields, settings, said) -> None:
    with pytest.raises(RecipeError, match=said):
        Export().check(ExportConfig(to="falcon_h1", **settings), {"model": model_meta(save(tmp_path, **fields))})


@pytest.mark.parametrize(
    ("fields", "fix"),
    [({}, "use to=falcon_h1"), ({"family": "qwen3"}, "do: use to=native")],
    ids=["falcon_h1 would do", "nothing else would do"],
)
def test_a_refused_deepseek_export_of_states_names_what_would_do(tmp_path, fields, fix) -> None:
    meta: ArtifactMeta = model_meta(save(tmp_path, **fields))
    with pytest.raises(RecipeError, match=fix):
        Export().check(ExportConfig(to="deepseek_v3"), {"model": meta})
