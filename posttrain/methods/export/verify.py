"""What an exported folder computes, from a new process that has transformers and nothing of this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from posttrain.errors import StageError

PROMPTS, LENGTH, NEW_TOKENS = 4, 32, 16
PIECE = 8
"""Tokens of a prompt that are computed at a time where rounding noise is measured."""
PADDING = (0, 5, 11, 21)
"""Tokens on the left of each prompt that the padded batch hides."""
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return {'a': [x ** 2, -1.5e-3]}  # Ümläut, ÉTÉ, 東京, 🙂\n\n\t\ttabs  and   spaces ",
    "<|im_start|>user\n2 + 2 = ?<|im_end|>\n<s> </s> [INST] <|begin_of_text|>",
)
"""What the tokenizers are compared on: words, code, other scripts, spaces, spellings of special tokens."""
LATENT_NORMS = ("kv_a_layernorm", "q_a_layernorm")
PROBE = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, work = sys.argv[1], sys.argv[2]
asked = json.load(open(work + "/asked.json"))
how = {"local_files_only": True, **({"trust_remote_code": True} if asked["custom_code"] else {})}
tokenizer = AutoTokenizer.from_pretrained(folder, **how)
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **how)
wrong = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
assert not wrong, wrong
assert "posttrain" not in sys.modules
for name, module in model.named_modules():
    if asked["eps"] and name.endswith(tuple(asked["norms"])):
        module.variance_epsilon = asked["eps"]
given = load_file(work + "/ids.safetensors")
ids, mask = given["ids"], given["mask"]
with torch.no_grad():
    whole = model.eval()(ids, use_cache=False).logits
    first = model(ids[:, :-1], use_cache=True)
    last = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
    padded = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    after = model(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True).logits
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), **asked["generate"])
def elements(layer, *kinds):
    held = [getattr(layer, kind, None) for kind in kinds]
    held = [t for one in held for t in (one.values() if isinstance(one, dict) else [one])]
    return sum(t.numel() for t in held if t is not None)
layers = last.past_key_values.layers
tensors = {"logits": whole, "decoded": last.logits, "generated": generated, "padded": torch.cat((padded, after[:, 0]))}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, work + "/found.safetensors")
facts = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()),
         "cache_elements_per_token": sum(elements(layer, "keys", "values") for layer in layers) / ids.numel(),
         "state_elements": sum(elements(layer, "recurrent_states") for layer in layers) / len(ids),
         "column_elements": sum(elements(layer, "conv_states") for layer in layers) / len(ids),
         "tokens": [tokenizer(text)["input_ids"] for text in asked["texts"]], "chat_template": tokenizer.chat_template,
         "eos": [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id]}
json.dump(facts, open(work + "/facts.json", "w"))
"""


def greedy(new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Arguments of `generate` for a fixed number of likeliest tokens, whatever the model's own settings."""
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "use_cache": True}


@dataclass(frozen=True)
class Found:
    """fp32 logits [B, T, V], those of the last token decoded with the cache [B, 1, V], those of a left-padded batch
    (`of_padded`), prompt and greedy tokens [B, T + 16], and facts: class, parameters, elements of the cache per token
    and per sequence, token ids of `TEXTS`, chat template, EOS ids.
    """

    logits: Tensor
    decoded: Tensor
    padded: Tensor
    generated: Tensor
    facts: dict[str, Any]


def prompt_ids(vocabulary: int, seed: int) -> Tensor:
    """The fixed prompts of a seed, [4, 32] token ids."""
    return torch.randint(0, vocabulary, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding_mask() -> Tensor:
    """Which tokens of the prompts the padded batch shows, [4, 32]."""
    return (torch.arange(LENGTH) >= torch.tensor(PADDING)[:, None]).long()


def of_padded(model: Any, ids: Tensor) -> Tensor:
    """Logits of the tokens of a left-padded batch, row by row, then once more of every row's last one: [N + B, V]."""
    mask = padding_mask()
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    return torch.cat((logits[mask.bool()], logits[:, -1]))


def probe(folder: Path, ids: Tensor, work: Path, *, eps: float = 0.0, custom_code: bool = True) -> Found:
    """Load a folder in a new process and ask it.

    Args:
        eps: other than 0 replaces that of the latent norms, as another loader would build them.
        custom_code: whether the folder's own code may run (`trust_remote_code`).

    Raises:
        StageError: the folder cannot be loaded without this package.
    """
    work.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids, "mask": padding_mask()}, work / "ids.safetensors")
    asked = {"eps": eps, "custom_code": custom_code, "generate": greedy(), "texts": TEXTS, "norms": LATENT_NORMS}
    (work / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder.resolve()), str(work.resolve())],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageError(f"the export does not load in a new process: {last}", str(folder), "report this as a fault")
    read = load_file(work / "found.safetensors")
    facts = json.loads((work / "facts.json").read_text(encoding="utf-8"))
    return Found(read["logits"], read["decoded"], read["padded"], read["generated"], facts)


def load_here(folder: Path, eps: float, dtype: torch.dtype = torch.float32) -> Any:
    """An exported folder in this process, its weights as `dtype`; `eps` as for `probe`."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True).eval()
    for name, module in model.named_modules():
        if eps and name.endswith(LATENT_NORMS):
            module.variance_epsilon = eps
    return model


def errors(wanted: Tensor, found: Tensor) -> dict[str, float]:
    """Largest absolute difference, and the same over the largest absolute logit; NaN counts as infinite."""
    absolute = torch.nan_to_num((wanted - found).abs(), nan=torch.inf).max().item()
    return {"max_abs": absolute, "relative": absolute / wanted.abs().max().item()}


@torch.no_grad()
def noise(model: Any, ids: Tensor, wanted: Tensor) -> float:
    """How far the model is from itself when its own arithmetic is ordered otherwise: row by row, attention eager.

    Rows alone do not change how a state is summed: models with states go through the prompts in pieces too.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found = [torch.cat([model(row[None], use_cache=False).logits for row in ids])]
        if "mamba2" in (getattr(model.config, "mixers", None) or ()):
            found.append(torch.cat([_in_pieces(model, row[None]) for row in ids]))
    finally:
        model.set_attn_implementation(implementation)
    return max(errors(wanted, logits)["relative"] for logits in found)


def _in_pieces(model: Any, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of `PIECE` tokens at a time, with the cache."""
    cache, logits = None, []
    for piece in ids.split(PIECE, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def compare_generated(model: Any, ids: Tensor, found: Tensor, tolerance: float) -> dict[str, Any]:
    """Whether greedy tokens with the cache are the model's own: `equal`, or a difference explained by a `tie`.

    A tie: where a row first differs, the model's logits of both tokens are within twice the tolerance.
    """
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy())
    worst = 0.0
    for ours, theirs in zip(wanted, found, strict=True):
        if torch.equal(ours, theirs):
            continue
        at = int((ours != theirs).nonzero()[0])
        logits = model(ours[None, :at], use_cache=False).logits[0, -1]
        gap = (logits[ours[at]] - logits[theirs[at]]).abs() / logits.abs().max()
        worst = max(worst, gap.item())
    equal = torch.equal(wanted, found)
    return {"tokens": found[:, ids.shape[1] :].numel(), "equal": equal, "tie": not equal and worst <= 2 * tolerance}
