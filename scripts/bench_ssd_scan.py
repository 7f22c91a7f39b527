"""Time `ssd_scan` at a size of one's own, forward and with backward, beside its peers and the bytes it has to move.

    python scripts/bench_ssd_scan.py --batch 8 --tokens 4096 --groups 8 8 32 --out kernels/benchmarks/results
    python scripts/bench_ssd_scan.py --batch 1 --tokens 45 --heads 4 --groups 2 2 4 --head 16 --state 16    # CPU

Cases, peers and the limit are those of `kernels/benchmarks/bench_ssd_scan.py`, which `make bench` runs at fixed sizes.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch

from benchmarks.bench_ssd_scan import Shape, scan_case
from benchmarks.ceilings import measure_ceilings
from benchmarks.harness import Run, ceiling_rows, run_case, write_rows
from benchmarks.table import table


def main(argv: list[str] | None = None) -> int:
    """Check, time, print; 1 if ours is wrong or failed."""
    options = _arguments(argv)
    device = torch.device(options.device)
    shape = Shape(options.batch, options.tokens, options.heads, tuple(options.groups), options.head, options.state)
    measured = measure_ceilings(device)
    run = Run(device, measured.ceilings, quick=device.type == "cpu")
    print(f"{shape}, {run.columns()['gpu']}, copies {run.ceilings.copy_gb_s:.0f} GB/s")
    results, file = [], "ssd_scan_captured.csv" if options.graph_calls else "ssd_scan.csv"
    if options.out:
        write_rows(options.out / "ceilings.csv", ceiling_rows(measured, run))
    for backward in (False, True):
        # Each at once: a peer that tries out its launch shapes for minutes may be cut short.
        for name in options.implementations or scan_case(shape, device, backward).implementations:
            case = replace(scan_case(shape, device, backward), graph_calls=options.graph_calls)
            found = run_case(case, run, [name])
            print(table(found), flush=True)
            results += found
            if options.out:
                write_rows(options.out / file, [result.row(run) for result in found])
    print(table(results))
    return int(any(result.ours_is_bad() for result in results))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32, help="of decays and outputs")
    parser.add_argument("--groups", type=int, nargs=3, default=[32, 32, 32], metavar=("X", "B", "C"))
    parser.add_argument("--head", type=int, default=64, help="head width P")
    parser.add_argument("--state", type=int, default=64, help="state width N")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="leave out all but these")
    parser.add_argument(
        "--graph-calls",
        type=int,
        default=0,
        metavar="N",
        help="time replays of N captured calls (GPU): what the card takes alone",
    )
    parser.add_argument("--out", type=Path, help="append to ssd_scan.csv in this folder, or ssd_scan_captured.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
