"""Stock DeepSeek-V3 exports against the native model, in a new process, for both loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from source_models import make_source

from posttrain.errors import RecipeError, StageError
from posttrain.methods.export import deepseek, verify
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.write import export_model
from posttrain.methods.mla_upcycling import upcycle
from posttrain.models.loading import save_model
from posttrain.models.tiny import tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def save(folder: Path, family: str = "llama", pairs: str = "uniform", dtype=None, **changes) -> Path:
    settings = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "rotary_pairs": pairs}
    model, _ = upcycle(make_source(family, **changes), settings)
    return save_model(model, tiny_tokenizer(), folder / "native", dtype=dtype)


def export(source: Path, **settings) -> dict:
    target = source.parent / "export"
    target.mkdir()
    return export_model(source, target, ExportConfig(**{"to": "deepseek_v3", **settings}))


@pytest.mark.parametrize("loader", ["transformers", "vllm"])
@pytest.mark.parametrize(
    ("family", "pairs", "rope"),
    [
        ("llama", "uniform", None),
        ("llama", "fastest", None),
        ("mistral", "uniform", None),
        ("llama", "uniform", LLAMA3),
    ],
)
def test_a_stock_export_has_the_logits_of_the_native_model(tmp_path, loader, family, pairs, rope) -> None:
    changes = {"rope_parameters": rope} if rope else {}
    certificate = export(save(tmp_path, family, pairs, **changes), loader=loader)
    assert certificate["class"] == "DeepseekV3ForCausalLM"
    assert all(step["relative"] <= 1e-5 for step in certificate["steps"])
    assert certificate["cache_bytes_per_token"]["predicted"] == certificate["cache_bytes_per_token"]["measured"]
    assert certificate["latent_norm_eps"] == (1e-6 if loader == "transformers" else 1e-5)


def test_the_wrong_loader_is_far_off_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("posttrain.methods.export.deepseek.latent_eps", lambda eps, loader: eps)
    with pytest.raises(StageError, match="logits are off"):
        export(save(tmp_path))
    assert not list((tmp_path / "export").iterdir())


def test_native_loads_without_this_package(tmp_path) -> None:
    certificate = export(save(tmp_path), to="native")
    assert certificate["class"] == "UpcycledForCausalLM" and "vLLM" in certificate["servers"]


def test_bf16_weights_have_their_floor_measured(tmp_path) -> None:
    certificate = export(save(tmp_path, dtype=torch.bfloat16))
    assert certificate["dtype"] == "bfloat16" and certificate["steps"][-1]["relative"] < 0.1


def test_what_would_not_be_exact_is_refused(tmp_path) -> None:
    for index, (fields, said) in enumerate(
        [
            ({"family": "qwen2"}, "no place for attention_bias"),
            ({"pairs": "fastest", "rope_parameters": LLAMA3}, "kept"),
        ]
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        with pytest.raises(RecipeError, match=said):
            export(save(folder, **fields))


def test_ranks_per_layer_and_query_ranks_are_padded_exactly() -> None:
    from posttrain.models.upcycled import UpcycledConfig, UpcycledForCausalLM

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
