"""Verification 13 of the method card: stock DeepSeek-V3 has the native model's logits, loaded in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods.export.export_world import LLAMA3, export, save
from safetensors.torch import load_file, save_file

from posttrain.errors import StageError
from posttrain.methods.export import verify
from posttrain.models.loading import load_model

STOCK = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM
model = DeepseekV3ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
for name, module in model.named_modules():
    if name.endswith(("kv_a_layernorm", "q_a_layernorm")) and float(sys.argv[4]):
        module.variance_epsilon = float(sys.argv[4])
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["ids"]).logits
assert not any(name.startswith("posttrain") for name in sys.modules)
save_file({"logits": logits}, sys.argv[3])
"""


def stock_logits(folder: Path, ids: torch.Tensor, eps: float, work: Path) -> torch.Tensor:
    """Logits of plain transformers classes in another process; `eps` 0 leaves the norms as transformers builds them."""
    save_file({"ids": ids}, work / "ids.safetensors")
    arguments = [str(folder), str(work / "ids.safetensors"), str(work / "found.safetensors"), str(eps)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", STOCK, *arguments], cwd=work, env=clean, check=True, capture_output=True)
    return load_file(work / "found.safetensors")["logits"]


@pytest.mark.parametrize("rms_norm_eps", [1e-6, 1e-5])
@pytest.mark.parametrize("loader", ["transformers", "vllm"])
def test_card_verification_13_stock_logits_are_the_native_ones(tmp_path, loader, rms_norm_eps) -> None:
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    native = save(tmp_path, rms_norm_eps=rms_norm_eps, rope_parameters=rope)
    certificate = export(native, loader=loader)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    # Loaders from before rope_parameters read rope_theta and would take 10000 without it.
    assert config["model_type"] == "deepseek_v3" and config["rope_theta"] == 20000.0
    ids = verify.prompt_ids(300, 7)
    with torch.no_grad():
        wanted = load_model(native)(ids).logits
    # vLLM and SGLang build the latent norms with rms_norm_eps; transformers with 1e-6 whatever the config says.
    found = stock_logits(tmp_path / "export", ids, rms_norm_eps if loader == "vllm" else 0.0, tmp_path)
    assert verify.errors(wanted, found)["relative"] <= 1e-5
    assert certificate["latent_norm_eps"] == (rms_norm_eps if loader == "vllm" else 1e-6)


def test_card_verification_13_the_other_loader_is_wrong(tmp_path) -> None:
    native = save(tmp_path)
    export(native, loader="vllm")
    ids = verify.prompt_ids(300, 7)
    with torch.no_grad():
        wanted = load_model(native)(ids).logits
    assert verify.errors(wanted, stock_logits(tmp_path / "export", ids, 0.0, tmp_path))["relative"] > 1e-2


def test_card_verification_13_a_wrong_epsilon_is_noticed_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("posttrain.methods.export.deepseek.latent_eps", lambda eps, loader: eps)
    with pytest.raises(StageError, match="logits are off"):
        export(save(tmp_path))
    assert not list((tmp_path / "export").iterdir())


@pytest.mark.parametrize(
    ("family", "settings", "changes"),
    [
        ("llama", {"rotary_pairs": "fastest"}, {}),
        ("mistral", {}, {}),
        ("llama", {}, {"rope_parameters": LLAMA3}),
        ("llama", {}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("llama", {"q_lora_rank": 24}, {}),
        ("llama", {"rotary_plan": "rorope", "rotary_pairs": None, "freqfold": 4}, {}),
    ],
)
def test_card_verification_13_other_sources_and_plans(tmp_path, family, settings, changes) -> None:
    certificate = export(save(tmp_path, family, settings=settings, **changes))
    assert certificate["class"] == "DeepseekV3ForCausalLM"
    assert all(step["relative"] <= 1e-5 for step in certificate["steps"])
    assert certificate["cache_bytes_per_token"]["predicted"] == certificate["cache_bytes_per_token"]["measured"]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_latents_of_any_size_get_a_norm_that_is_a_constant(tmp_path, scale) -> None:
    """Latent rows times a, the matrices behind them over a: the same function, other latents."""
    from methods.export.export_world import convert

    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    _, model = convert()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_a_proj_with_mqa.weight[:16] *= scale
            layer.self_attn.kv_b_proj.weight /= scale
    certificate = export(save_model(model, tiny_tokenizer(), tmp_path / "native"))
    assert all(step["relative"] <= certificate["tolerance"] for step in certificate["steps"])
    assert certificate["tolerance"] <= 2e-5
