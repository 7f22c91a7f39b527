"""Run the benchmarks: `python kernels/benchmarks/run.py [--only OP ...] [--out DIR] [--quick]`.

Every `bench_*.py` beside this file offers `cases(device, quick)`, and may offer `summary(results)`, printed last. Rows
are appended to `results/<operator>.csv`; the table comes before the summaries. Without a GPU only the quick sizes run,
to see that the code works, and no row is stored unless --out is given.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]  # `benchmarks`, `posttrain_kernels`; `posttrain`

import torch

from benchmarks.harness import (
    Case,
    Measurement,
    Run,
    ceiling_rows,
    measure_ceilings,
    run_case,
    write_rows,
)
from benchmarks.table import table

RESULTS = HERE / "results"


def main(argv: list[str] | None = None) -> int:
    """Measure, store, print the table; 1 if an implementation of ours is wrong or failed."""
    args = _arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick = args.quick or device.type == "cpu"
    out = args.out or (RESULTS if device.type == "cuda" and not quick else None)
    if device.type == "cpu":
        print("No CUDA device here: quick sizes on the CPU, to see that the code runs. The times say nothing.")
    ceilings = measure_ceilings(device)
    run = Run(device, ceilings.ceilings, quick)
    print(f"copy {run.ceilings.copy_gb_s:.0f} GB/s, matmul {run.ceilings.matmul_tflop_s:.2f} TFLOP/s, measured now")
    if out:
        write_rows(out / "ceilings.csv", ceiling_rows(ceilings, run))
    results: list[Measurement] = []
    for module in _modules():
        for case in _cases(module, args.only, device, quick):
            measured = run_case(case, run, args.implementations)
            results += measured
            if out:
                write_rows(out / f"{case.operator}.csv", [result.row(run) for result in measured])
    print(f"rows appended in {out}" if out else "no row stored (--out DIR stores them)")
    if any(result.reason.startswith("not installed") for result in results):
        print("peers that are not installed: pip install -e '.[bench]' -c constraints.txt")
    print(table(results))
    for module in _modules():
        if hasattr(module, "summary"):
            print(module.summary(results))
    return int(any(result.ours_is_bad() for result in results))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="OP", help="operators, or modules without bench_")
    parser.add_argument(
        "--implementations", nargs="+", metavar="NAME", help="leave out all but these, for a quick look"
    )
    parser.add_argument("--out", type=Path, help=f"folder of the CSV files (default {RESULTS}; none for quick runs)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    return parser.parse_args(argv)


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"benchmarks.{path.stem}") for path in sorted(HERE.glob("bench_*.py"))]


def _cases(module: ModuleType, only: list[str] | None, device: torch.device, quick: bool) -> Iterator[Case]:
    name = module.__name__.rpartition("bench_")[2]
    for case in module.cases(device, quick):
        if not only or name in only or case.operator in only:
            yield case


if __name__ == "__main__":
    sys.exit(main())
