"""Roll-outs: our decoder beside transformers' `generate`, sampled at temperature 1, every row to its last token.

    python scripts/bench_rollout.py --model FOLDER --prompts 64 256 1024 --peers
    python scripts/bench_rollout.py --shape llama32_1b --peers          # random weights
    python scripts/bench_rollout.py --shape tiny --prompts 4 --new-tokens 8 --peers   # a CPU is enough

Everything is measured in one run: the median of `--repeats` after a warm-up, whose seconds are given too (for us:
packing weights, compiling kernels, capturing the step). Sizes share the process and the compilers' caches: the first
one's warm-up compiles what the caches on disk do not hold, a later one's what is new for its shapes. For a cold warm-up
give one size a run, and empty folders as TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR. A *token* is one step of the
whole batch. Rows go to the benchmarks' CSV; without a GPU none is stored unless --out is given.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import gc
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from rollout_parts import limit_ms, logprob_errors, now, profile, step_parts
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from benchmarks.ceilings import measure_ceilings
from benchmarks.harness import Run, write_rows
from posttrain.generation import DecodeEngine, Sampling

RESULTS = ROOT / "kernels" / "benchmarks" / "results"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab=300, width=64, inner=96, layers=2, heads=4, shared=2, rope={"rope_type": "default"}),
    "smollm2_135m": dict(
        vocab=49152, width=576, inner=1536, layers=30, heads=9, shared=3, rope={"rope_type": "default"}
    ),
    "llama32_1b": dict(vocab=128256, width=2048, inner=8192, layers=16, heads=32, shared=8, rope=LLAMA3_ROPE),
}
PEERS = {"generate_dynamic": {}, "generate_static_compile": {"cache_implementation": "static"}}


@dataclass
class Result:
    """One implementation at one number of prompts; times in ms a token (one step of the batch)."""

    prompts: int
    name: str
    warmup_s: float = 0.0
    ms_per_token: float | None = None
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    correct: bool | None = None
    parts: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def main(argv: list[str] | None = None) -> int:
    """Measure, store, print; 1 if our decoder's log-probabilities are wrong."""
    args = _arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model, label = _model(args, device)
    run = Run(device, measure_ceilings(device).ceilings)
    out = args.out or (RESULTS if device.type == "cuda" else None)
    wrong = False
    for prompts in args.prompts:
        rows = _prompts(prompts, args.prompt_tokens, model.config.vocab_size)
        results = [_ours(model, rows, args)]
        results += [_peer(name, model, rows, args) for name in (PEERS if args.peers else ())]
        wrong |= results[0].correct is False
        limit = limit_ms(model, rows, args.new_tokens, run.ceilings)
        _print(label, results, limit, first=prompts == args.prompts[0])
        if out:
            csv_rows = [row for result in results for row in _rows(result, label, model, args, limit, run)]
            write_rows(out / "rollout.csv", csv_rows)
    print(f"rows appended to {out / 'rollout.csv'}" if out else "no row stored (--out DIR stores them)")
    return int(wrong)


def _ours(model: PreTrainedModel, rows: list[list[int]], args: argparse.Namespace) -> Result:
    result = Result(len(rows), "posttrain")
    _reset(model.device)
    started = now(model.device)
    engine = DecodeEngine(model, len(rows), max(map(len, rows)) + args.new_tokens, dtype=model.dtype)
    answers = engine.generate(rows, _sampling(args, seed=0))
    result.warmup_s = now(model.device) - started
    timed = [engine.generate(rows, _sampling(args, seed=seed)) for seed in range(1, args.repeats + 1)]
    seconds = statistics.median(answer.seconds for answer in timed)
    _fill(result, seconds, sum(map(len, timed[0].tokens)), args, model.device)
    result.parts = {
        "prefill": 1000 * statistics.median(answer.prefill_seconds for answer in timed),
        **step_parts(engine, len(rows), _sampling(args, seed=0), model.device),
    }
    error, eager = logprob_errors(model, rows[:8], answers)
    result.correct = error <= 1.5 * eager + 1e-5
    print(f"log-probabilities against fp32, rms: ours {error:.2e}, a full forward in {model.dtype} {eager:.2e}")
    if args.profile:
        profile(engine, len(rows), _sampling(args, seed=0))
    return result


def _peer(name: str, model: PreTrainedModel, rows: list[list[int]], args: argparse.Namespace) -> Result:
    """transformers' generate within the time limit; a reason where it failed or was too slow."""
    result, device = Result(len(rows), name), model.device
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=args.new_tokens,
        pad_token_id=0,
        **PEERS[name],
    )

    def once() -> float:
        started = now(device)
        new = model.generate(ids, attention_mask=mask).shape[1] - width
        assert new == args.new_tokens, f"{new} tokens came"
        return now(device) - started

    _reset(device)
    try:
        with _limit(args.limit), torch.inference_mode():
            result.warmup_s = once()
            seconds = statistics.median(once() for _ in range(args.repeats))
        _fill(result, seconds, len(rows) * args.new_tokens, args, device)
    except Exception as error:  # a peer that fails is a result like the others
        result.reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    finally:
        torch.compiler.reset()
    return result


def _rows(
    result: Result, label: str, model: PreTrainedModel, args: argparse.Namespace, limit: float, run: Run
) -> list[dict[str, Any]]:
    """CSV rows: ms a token with everything (`generate`), the warm-up, and our parts."""
    shared = {
        "operator": "rollout",
        "shape": f"{label} B{result.prompts} P{args.prompt_tokens} N{args.new_tokens}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "implementation": result.name,
        "peak_mib": None,
        "limit_ms": None,
        "correct": result.correct,
        **run.columns(),
    }
    rows = [{**shared, "direction": "generate", "median_ms": result.ms_per_token, "peak_mib": result.peak_mib}]
    rows[0]["limit_ms"] = limit
    if not result.reason:
        rows.append({**shared, "direction": "warmup", "median_ms": 1000 * result.warmup_s})
    rows += [{**shared, "direction": part, "median_ms": ms} for part, ms in result.parts.items()]
    return rows


def _print(label: str, results: list[Result], limit: float, first: bool) -> None:
    print(f"\n{label}, {results[0].prompts} prompts (memory traffic alone: {limit:.3f} ms a token)")
    known = (
        "compiles what the caches on disk do not hold"
        if first
        else "finds what earlier sizes compiled, where their shapes allow"
    )
    print(f"  warm-up {known}")
    for result in results:
        if result.reason:
            print(f"  {result.name:24} {result.reason}")
            continue
        peak = "" if result.peak_mib is None else f"  peak {result.peak_mib:7.0f} MiB"
        speed = f"{result.ms_per_token:8.3f} ms a token  {result.tokens_per_s:9.0f} tokens/s"
        print(f"  {result.name:24} {speed}  warm-up {result.warmup_s:6.1f} s{peak}  correct {result.correct}")
        if result.parts:
            print("    " + ", ".join(f"{part} {ms:.3f} ms" for part, ms in result.parts.items()))


def _model(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, str]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.model:
        from posttrain.models.loading import load_model

        return load_model(args.model, device=str(device), dtype=dtype), args.model.name
    shape = SHAPES[args.shape]
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["shared"],
        head_dim=64 if args.shape != "tiny" else 16,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 100000.0, **shape["rope"]},
        tie_word_embeddings=True,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval(), f"{args.shape} (random weights)"


def _prompts(count: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of half to all of `tokens` tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(max(1, tokens // 2), tokens + 1, (count,), generator=generator).tolist()
    lengths[0] = tokens
    return [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def _sampling(args: argparse.Namespace, seed: int) -> Sampling:
    return Sampling(max_new_tokens=args.new_tokens, temperature=1.0, seed=seed)


def _fill(result: Result, seconds: float, tokens: int, args: argparse.Namespace, device: torch.device) -> None:
    result.ms_per_token = 1000 * seconds / args.new_tokens
    result.tokens_per_s = tokens / seconds
    if device.type == "cuda":
        result.peak_mib = torch.cuda.max_memory_allocated(device) / 2**20


def _reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """TimeoutError in the block after that many seconds, compilation included."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="FOLDER")
    which.add_argument("--shape", choices=SHAPES, help="random weights of that shape")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024], metavar="N")
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, metavar="N", help="longest; the shortest is half of it"
    )
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs after the warm-up")
    parser.add_argument("--peers", action="store_true", help="measure transformers' generate too")
    parser.add_argument("--limit", type=int, default=150, metavar="S", help="seconds for a peer at one size")
    parser.add_argument("--profile", action="store_true", help="print the time by kernel")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of the CSV (default {RESULTS}; none on a CPU)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
