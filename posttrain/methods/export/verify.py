"""Logits and cache of an exported folder, from a new process that has transformers and nothing of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import StageError

PROMPTS, LENGTH = 4, 32
PROBE = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, work, eps = sys.argv[1], sys.argv[2], float(sys.argv[3])
model, info = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True, local_files_only=True, output_loading_info=True)
wrong = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
assert not wrong, wrong
assert "posttrain" not in sys.modules
for name, module in model.named_modules():
    if eps and name.endswith(("kv_a_layernorm", "q_a_layernorm")):
        module.variance_epsilon = eps
ids = load_file(work + "/ids.safetensors")["ids"]
with torch.no_grad():
    whole = model.eval()(ids, use_cache=False).logits
    first = model(ids[:, :-1], use_cache=True)
    last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
layers = last.past_key_values.layers
size = sum(t.numel() for layer in layers for t in (layer.keys, layer.values))
save_file({"logits": whole.contiguous(), "decoded": last.logits.contiguous()}, work + "/logits.safetensors")
facts = {"class": type(model).__name__, "cache_elements_per_token": size / ids.numel()}
json.dump(facts, open(work + "/facts.json", "w"))
"""


def prompt_ids(vocabulary: int, seed: int) -> Tensor:
    """The fixed prompts of a seed, [4, 32] token ids."""
    return torch.randint(0, vocabulary, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(seed))


def probe(folder: Path, ids: Tensor, work: Path, eps: float = 0.0) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """fp32 logits [B, T, V], those of the last token decoded with the cache [B, 1, V], and facts about the model.

    `eps` other than 0 replaces that of the latent norms, as another loader would build them.

    Raises:
        StageError: the folder cannot be loaded without this package.
    """
    work.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids}, work / "ids.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder.resolve()), str(work.resolve()), str(eps)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageError(f"the export does not load in a new process: {last}", str(folder), "report this as a fault")
    read = load_file(work / "logits.safetensors")
    return read["logits"], read["decoded"], json.loads((work / "facts.json").read_text())


def errors(wanted: Tensor, found: Tensor) -> dict[str, float]:
    """Largest absolute difference, and the same over the largest absolute logit; NaN counts as infinite."""
    absolute = torch.nan_to_num((wanted - found).abs(), nan=torch.inf).max().item()
    return {"max_abs": absolute, "relative": absolute / wanted.abs().max().item()}
