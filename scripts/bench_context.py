"""Decoding at long contexts: latent attention and hybrids beside the attention they came from, same decoder.

    python scripts/bench_context.py --batch 1 16 64 --context 2048 8192 32768 131072 --out kernels/benchmarks/results
    python scripts/bench_context.py --shape tiny --batch 1 2 --context 16 --rank 16 --rope 8        # smoke test, CPU

One step of the graph-captured decoder, caches full of random numbers up to the context: tokens a second, milliseconds,
bytes of weights and caches, beside the time that reading both once takes. Weights are random, and said to be: this is
about speed and memory. `gqa` is the source, `mla` has `--rank` + `--rope` cached elements a token and layer; `hybrid25`
and `hybrid50` have such layers for a quarter and a half, Mamba-2 elsewhere, `hybrid50_gqa` the source's own for a half.
The exit code is 1 if the caches are more than 5 % off what the plan of a recipe would say.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import gc
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import torch
from bench_distill_step import SHAPES
from rollout_parts import time_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.harness import package_version
from benchmarks.results import write_rows
from posttrain.generation import DecodeEngine
from posttrain.models.architecture import cache_bytes, normalise
from posttrain.models.upcycled import UpcycledConfig, UpcycledForCausalLM

MODELS = {"gqa": 1.0, "mla": 1.0, "hybrid25": 0.25, "hybrid50": 0.5, "hybrid50_gqa": 0.5}
"""Share of the layers that are attention."""


def main() -> int:
    options = _arguments()
    device = torch.device(options.device)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    ceilings = measure_ceilings(device).ceilings
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    print(f"{options.shape} (random weights), {gpu}, copies {ceilings.copy_gb_s:.0f} GB/s; one token a row a step")
    off = False
    for name in options.models:
        model = make_model(options, name, device)
        for batch in options.batch:
            for context in options.context:
                found = measure(model, batch, context, device, ceilings)
                gc.collect()
                if found is None:
                    print(f"  {name}  batch {batch:3} context {context:6}  out of memory")
                    continue
                right = abs(found["cache_gib"] / found["planned_gib"] - 1) <= 0.05
                off |= not right
                print(
                    f"  {name:12}  batch {batch:3} context {context:6}  {found['ms']:8.3f} ms "
                    f"{batch / found['ms'] * 1e3:9.0f} tokens/s  limit {found['limit_ms']:7.3f} ms  "
                    f"{found['gib']:7.2f} GiB, caches {found['cache_gib']:.4f}, planned {found['planned_gib']:.4f}",
                    flush=True,
                )
                if options.out and device.type == "cuda":
                    row = {"operator": "decode_context", "dtype": "bfloat16", "implementation": _label(options, name)}
                    row |= {"shape": f"{options.shape} (random weights) B{batch} S{context}", "direction": "step"}
                    row |= {"median_ms": found["ms"], "peak_mib": found["gib"] * 1024, "limit_ms": found["limit_ms"]}
                    versions = {"torch": torch.__version__, "triton": package_version("triton")}
                    row |= {"correct": right, "gpu": gpu, **versions}
                    write_rows(Path(options.out) / "decode_context.csv", [{**row, "date": date}])
        del model
        gc.collect()
    return int(off)


def make_model(options: argparse.Namespace, name: str, device: torch.device) -> PreTrainedModel:
    """The source shape, or the same with other mixers (`MODELS`), in bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    longest = 2 * max(options.context)
    source = AutoConfig.for_model("llama", **SHAPES[options.shape], max_position_embeddings=longest)
    torch.manual_seed(0)
    with device:
        if name == "gqa":
            return AutoModelForCausalLM.from_config(source, dtype=dtype).eval()
        head_dim = source.head_dim or source.hidden_size // source.num_attention_heads
        attention = "full_attention" if name.endswith("gqa") else "latent_attention"
        layers = source.num_hidden_layers
        kept = {int((index + 0.5) / MODELS[name]) for index in range(round(layers * MODELS[name]))}
        latent = dict(kv_lora_rank=options.rank, qk_nope_head_dim=head_dim, qk_rope_head_dim=options.rope)
        config = UpcycledConfig.from_source(
            source,
            mixers=[attention if layer in kept else "mamba2" for layer in range(layers)],
            **({} if attention == "full_attention" else {**latent, "v_head_dim": head_dim}),
        )
        return UpcycledForCausalLM._from_config(config, dtype=dtype).eval()


def measure(
    model: PreTrainedModel, batch: int, context: int, device: torch.device, ceilings: Ceilings
) -> dict[str, float] | None:
    """One step at a full cache; None where the caches do not fit."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        engine = DecodeEngine(model, max_rows=batch, max_tokens=context, share=True)
        for cache in engine.decoder.caches:
            for tensor in cache.tensors:
                tensor.normal_()
        state = engine.state
        state.begin(torch.zeros(batch, dtype=torch.long, device=device), context - 1, batch, ())
        with torch.no_grad():
            ms = time_of(lambda: engine.decoder.step(state.token, state.slot, state.start), device, calls=10)
    except torch.cuda.OutOfMemoryError:
        return None
    arch, size = normalise(model.config.to_dict()), 2 if cuda else 4
    cached = batch * cache_bytes(arch, context, size)
    weights = sum(parameter.numel() for parameter in model.parameters()) * size
    return {
        "ms": ms,
        "limit_ms": ceilings.bytes_ms(weights + cached),
        "gib": (torch.cuda.max_memory_allocated() if cuda else engine.bytes()) / 2**30,
        "planned_gib": cached / 2**30,
        "cache_gib": engine.decoder.cache_bytes() / 2**30,
    }


def _label(options: argparse.Namespace, name: str) -> str:
    """All are ours: the source's attention is what the others are measured against."""
    if name.endswith("gqa"):
        return "source_gqa" if name == "gqa" else f"posttrain_{name}"
    return f"posttrain_{name}_r{options.rank}_dr{options.rope}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama32_1b")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rank", type=int, default=128, help="kv_lora_rank of the latent model")
    parser.add_argument("--rope", type=int, default=32, help="qk_rope_head_dim of the latent model")
    parser.add_argument("--out", help="append to decode_context.csv in this folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
