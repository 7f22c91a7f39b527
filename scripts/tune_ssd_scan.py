"""Time the launch shapes of `ssd_scan` on a GPU: every tile of `tiles.candidates`, pass by pass, right ones alone.

    python scripts/tune_ssd_scan.py --batch 8 --tokens 4096 --groups 32 32 32     # all, and the fastest together
    python scripts/tune_ssd_scan.py --batch 8 --tokens 4096 --head 128 --state 128 --passes backward run --out FOLDER
    TRITON_INTERPRET=1 python scripts/tune_ssd_scan.py --batch 1 --tokens 21 --heads 2 --groups 2 2 2 --head 16 \
        --state 16 --tiles 1                                                                    # smoke, CPU

`forward` is timed as the whole forward pass; `backward` (the gradients of chunks), `run` (tokens that a program of it
walks through; 0: whole rows or segments) and `states` (what is computed between chunks before) as the whole backward
pass, each with the fastest of those before. Outputs and gradients are compared with torch's chunks; what is wrong, or
does not run, is named. `ssd_scan/tiles.py` holds what is chosen.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from posttrain_kernels.ssd_scan.launch import Scan, scan_backward, scan_forward
from posttrain_kernels.ssd_scan.tiles import RUNS, Plan, Tile, candidates

from benchmarks.bench_ssd_scan import TOLERANCE, Inputs, Shape, make_inputs, reference
from benchmarks.harness import compare
from benchmarks.heads import dtype_for
from benchmarks.timing import measure

PASSES = ("forward", "backward", "run", "states")
COLUMNS = ("shape", "pass", "chunk", "width", "warps", "stages", "tma", "run", "ms", "verdict", "default")
WARMUP_MS, TIMED_MS, GRAPH_CALLS = 50.0, 200.0, 4
"""Of each launch shape: all of them take about a minute, most of it the compiler's. Calls are replayed from a CUDA
graph: launched one by one, a pass may take the host longer than the card."""


def main(argv: list[str] | None = None) -> int:
    """Time, print, store; 1 if a default tile is wrong or does not run."""
    options = _arguments(argv)
    device = torch.device(options.device)
    shape = Shape(options.batch, options.tokens, options.heads, tuple(options.groups), options.head, options.state)
    dtype = dtype_for(device)
    inputs = make_inputs(shape, device, dtype)
    expected = reference(inputs, backward=True)
    default = _chosen(inputs)
    tiles = candidates(shape.head, shape.state, dtype.itemsize)
    rows, best = [], default
    for of in options.passes:
        timed: list[tuple[float, Plan]] = []
        for plan in _plans(of, best, tiles, shape.tokens)[: options.tiles]:
            ms, verdict = _try(of, plan, inputs, expected, device)
            tile = _tile(of, plan)
            numbers = (tile.chunk, tile.width, tile.warps, tile.stages, tile.tma + tile.tma_out, plan.run or 0)
            row = (str(shape), of, *numbers, ms, verdict)
            rows.append(dict(zip(COLUMNS, (*row, _choice(of, plan) == _choice(of, default)), strict=True)))
            print(f"{of:9} {_text(of, plan)}  {ms:8.4f} ms  {verdict}", flush=True)
            timed += [(ms, plan)] if verdict == "right" else []
        timed.sort(key=lambda one: one[0])
        print(f"\n{of}, fastest first")
        for ms, plan in timed[: options.best]:
            print(
                f"  {_text(of, plan)}  {ms:8.4f} ms{'  (default)' if _choice(of, plan) == _choice(of, default) else ''}"
            )
        print(flush=True)
        best = timed[0][1] if timed else best
    for name, plan in (("default", default), ("fastest", best)):
        _total(name, plan, inputs, expected, device)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "tune_ssd_scan.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["default"] and row["verdict"] != "right" for row in rows))


def _chosen(inputs: Inputs) -> Plan:
    """What the operator chooses, its tiles as they are launched for these inputs."""
    scan = Scan.of(*inputs.leaves, None, 64)
    forward, backward = (
        replace(tile, pointers=None) if scan.copied(tile, scan.x, scan.b, scan.c) else tile.by_pointers()
        for tile in (scan.plan.forward, scan.plan.backward)
    )
    return replace(scan.plan, forward=forward, backward=backward)


def _plans(of: str, best: Plan, tiles: dict[str, list[Tile]], tokens: int) -> list[Plan]:
    """What is tried in one pass, what is fastest so far first; the chunk of `states` is that of `backward`."""
    if of == "forward":
        plans = [replace(best, forward=tile) for tile in tiles[of]]
    elif of == "states":
        plans = [replace(best, states=tile) for tile in tiles[of] if tile.chunk == best.backward.chunk]
    elif of == "run":
        runs = [run for run in RUNS if run < (best.segment or tokens) and (best.segment or 0) % run == 0]
        plans = [replace(best, run=run) for run in (None, *runs)]
    else:
        plans = [replace(best, backward=tile, states=replace(best.states, chunk=tile.chunk)) for tile in tiles[of]]
    return list(dict.fromkeys([best, *plans]))


def _try(
    of: str, plan: Plan, inputs: Inputs, expected: dict[str, torch.Tensor], device: torch.device
) -> tuple[float, str]:
    """Milliseconds of one pass (`both`: one after the other) and what is to be said of it; NaN where it did not run."""
    try:
        scan = Scan.of(*inputs.leaves, None, 64, plan)

        def backward() -> tuple[torch.Tensor | None, ...]:
            return scan_backward(scan, first, inputs.grad, None)

        def forward() -> tuple[torch.Tensor, ...]:
            return scan_forward(scan, None)[:1]

        first = scan_forward(scan, None)[2]
        runs = {"forward": forward, "both": lambda: (*forward(), *backward())}
        run = runs.get(of, backward)
        names = [f"grad_{name}" for name in ("x", "dt", "a", "b", "c", "d")]
        names = {"forward": ["y"], "both": ["y", *names]}.get(of, names)
        _, wrong = compare(dict(zip(names, run(), strict=False)), {name: expected[name] for name in names}, TOLERANCE)
        timing = measure(run, device, warmup_ms=WARMUP_MS, rep_ms=TIMED_MS, graph_calls=GRAPH_CALLS)
        return timing.median_ms, wrong or "right"
    except Exception as error:  # too little shared memory, or a compiler's failure: the next tile may run
        return float("nan"), f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"


def _total(name: str, plan: Plan, inputs: Inputs, expected: dict[str, torch.Tensor], device: torch.device) -> None:
    """Print what the passes take with one plan."""
    found = {of: _try(of, plan, inputs, expected, device) for of in ("forward", "backward", "both")}
    print(f"{name}: " + ", ".join(f"{of} {ms:.4f} ms ({verdict})" for of, (ms, verdict) in found.items()))
    print(f"  {plan}", flush=True)


def _tile(of: str, plan: Plan) -> Tile:
    return plan.backward if of == "run" else getattr(plan, of)


def _choice(of: str, plan: Plan) -> Tile | int | None:
    """What one pass chooses."""
    return getattr(plan, of)


def _text(of: str, plan: Plan) -> str:
    tile = _tile(of, plan)
    shape = f"chunk {tile.chunk:3} width {tile.width:3} warps {tile.warps} stages {tile.stages}"
    shape += f" tma {tile.tma + tile.tma_out}"
    return f"{shape} run {plan.run or 0:4}" if of in ("run", "backward") else shape


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32, help="of decays and outputs")
    parser.add_argument("--groups", type=int, nargs=3, default=[32, 32, 32], metavar=("X", "B", "C"))
    parser.add_argument("--head", type=int, default=64, help="head width P")
    parser.add_argument("--state", type=int, default=64, help="state width N")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--tiles", type=int, help="no more than so many of a pass")
    parser.add_argument("--best", type=int, default=4, help="tiles of a pass in the table")
    parser.add_argument("--out", type=Path, help="folder of tune_ssd_scan.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
