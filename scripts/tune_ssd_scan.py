"""Time the launch shapes of `ssd_scan` on a GPU: every tile of `tiles.candidates`, pass by pass, right ones alone.

    python scripts/tune_ssd_scan.py --batch 8 --tokens 4096 --groups 32 32 32 [--passes forward states backward]
    python scripts/tune_ssd_scan.py --batch 8 --tokens 4096 --head 128 --state 128 --out FOLDER
    TRITON_INTERPRET=1 python scripts/tune_ssd_scan.py --batch 1 --tokens 21 --heads 2 --groups 2 2 2 --head 16 \
        --state 16 --tiles 1                                                                    # smoke, CPU

`forward` is timed as the whole forward pass; `states` (chunk states, which backward computes anew) and `backward` (the
gradients) as the whole backward pass. Outputs and gradients are compared with torch's chunks; a tile that is wrong, or
that does not run, is named. `ssd_scan/tiles.py` holds what is chosen.
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
from posttrain_kernels.ssd_scan.tiles import Plan, Tile, candidates, choose_plan

from benchmarks.bench_ssd_scan import TOLERANCE, Inputs, Shape, make_inputs, reference
from benchmarks.harness import compare
from benchmarks.heads import dtype_for
from benchmarks.timing import measure

PASSES = ("forward", "states", "backward")
COLUMNS = ("shape", "pass", "chunk", "width", "warps", "stages", "ms", "verdict", "default")


def main(argv: list[str] | None = None) -> int:
    """Time, print, store; 1 if a default tile is wrong or does not run."""
    options = _arguments(argv)
    device = torch.device(options.device)
    shape = Shape(options.batch, options.tokens, options.heads, tuple(options.groups), options.head, options.state)
    dtype = dtype_for(device)
    inputs = make_inputs(shape, device, dtype)
    expected = reference(inputs, backward=True)
    lines = shape.batch * shape.heads
    chosen = choose_plan(lines, shape.tokens, shape.head, shape.state, dtype.itemsize, 64)
    rows = []
    for of in options.passes:
        default, plans = (
            getattr(chosen, of),
            _plans(of, chosen, candidates(shape.head, shape.state, dtype.itemsize)[of]),
        )
        for tile, plan in list(plans.items())[: options.tiles]:
            ms, verdict = _try(of, plan, inputs, expected, device)
            row = (str(shape), of, tile.chunk, tile.width, tile.warps, tile.stages, ms, verdict, tile == default)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
            print(f"{of:9} {_text(tile)}  {ms:8.4f} ms  {verdict}", flush=True)
    for of in options.passes:
        right = [row for row in rows if row["pass"] == of and row["verdict"] == "right"]
        print(f"\n{of}, fastest first")
        for row in sorted(right, key=lambda row: row["ms"])[: options.best]:
            tile = Tile(row["chunk"], row["width"], row["warps"], row["stages"])
            print(f"  {_text(tile)}  {row['ms']:8.4f} ms{'  (default)' if row['default'] else ''}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "tune_ssd_scan.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["default"] and row["verdict"] != "right" for row in rows))


def _plans(of: str, chosen: Plan, tiles: list[Tile]) -> dict[Tile, Plan]:
    """What runs for each tile of a pass, the default first; the chunk of `states` is that of `backward`."""
    tiles = [getattr(chosen, of), *tiles]
    if of == "forward":
        return {tile: replace(chosen, forward=tile) for tile in tiles}
    if of == "states":
        return {tile: replace(chosen, states=tile) for tile in tiles if tile.chunk == chosen.backward.chunk}
    return {tile: replace(chosen, backward=tile, states=replace(chosen.states, chunk=tile.chunk)) for tile in tiles}


def _try(
    of: str, plan: Plan, inputs: Inputs, expected: dict[str, torch.Tensor], device: torch.device
) -> tuple[float, str]:
    """Milliseconds of one pass and what is to be said of it; NaN where it did not run."""
    try:
        scan = Scan.of(*inputs.leaves, None, 64, plan)
        if of == "forward":
            names, run = ("y",), lambda: scan_forward(scan, None)
        else:
            names = tuple(f"grad_{name}" for name in ("x", "dt", "a", "b", "c", "d"))
            first = scan_forward(scan, None)[2]
            run = lambda: scan_backward(scan, first, inputs.grad, None)  # noqa: E731
        found = dict(zip(names, run(), strict=False))
        _, wrong = compare(found, {name: expected[name] for name in names}, TOLERANCE)
        return measure(run, device).median_ms, wrong or "right"
    except Exception as error:  # too little shared memory, or a compiler's failure: the next tile may run
        return float("nan"), f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"


def _text(tile: Tile) -> str:
    return f"chunk {tile.chunk:3} width {tile.width:3} warps {tile.warps} stages {tile.stages}"


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
