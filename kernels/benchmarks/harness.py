"""Benchmarks gated on correctness: a timing counts only if the numbers beside it are right.

A module `bench_<operator>.py` in this folder offers `cases(device, quick) -> list[Case]`; `run.py` finds and runs it:

    def cases(device, quick):
        return [Case(operator="swiglu", shape="T8192 D2048", dtype="bfloat16", direction="fwd",
                     inputs=lambda: make_inputs(device), reference=reference, limit_ms=lambda c: c.bytes_ms(n_bytes),
                     implementations={"posttrain": ours, "liger": liger})]

An implementation takes the inputs and returns `(run, outputs)`: `run()` is one measured pass, backward included;
`outputs(result)` names what it returned, `{"loss": ..., "grad_h": ...}`, in the reference's convention (a mean turned
into a sum there costs no measured time). It imports its library itself: ImportError means "not installed".
"""

from __future__ import annotations

import datetime
import gc
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings, MeasuredCeilings, measure_ceilings
from benchmarks.results import COLUMNS, OURS, is_ours, newest, read_rows, write_rows
from benchmarks.timing import Timing, measure, peak_mib, poison_free_memory

__all__ = [
    "COLUMNS",
    "OURS",
    "Case",
    "Ceilings",
    "MeasuredCeilings",
    "Measurement",
    "Run",
    "ceiling_rows",
    "is_ours",
    "measure",
    "measure_ceilings",
    "newest",
    "peak_mib",
    "read_rows",
    "relative_error",
    "run_case",
    "write_rows",
]

Outputs = Mapping[str, Tensor]
Implementation = Callable[[Any], tuple[Callable[[], Any], Callable[[Any], Outputs]]]


@dataclass(frozen=True)
class Case:
    """One operator at one size, with everything to compare.

    Attributes:
        inputs: makes fresh random inputs on the device; called once for all implementations, so that one which writes
            to an input must copy it first: the next would find its results there.
        implementations: name to a function of the inputs, see the module; ours are those of `results.is_ours`.
        reference: a function of the inputs that gives the expected outputs in higher precision.
        limit_ms: the least time physics allows, from the ceilings measured in this run; None when there is none.
        tolerance: largest allowed ‖out − ref‖ / ‖ref‖, for all outputs or by name.
        graph_calls: as in `timing.measure`, for operators smaller than their launch.
        flush: overwrite the L2 cache between calls.
    """

    operator: str
    shape: str
    dtype: str
    direction: str
    inputs: Callable[[], Any]
    implementations: Mapping[str, Implementation]
    reference: Callable[[Any], Outputs]
    limit_ms: Callable[[Ceilings], float] | None = None
    tolerance: float | Mapping[str, float] = 1e-2
    graph_calls: int = 0
    flush: bool = True


@dataclass(frozen=True)
class Run:
    """What all rows of one run of the benchmarks share; `date` tells runs apart."""

    device: torch.device
    ceilings: Ceilings = field(default_factory=Ceilings)
    quick: bool = False
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

    def columns(self) -> dict[str, str]:
        """Hardware, versions and date, as in the CSV."""
        cuda = self.device.type == "cuda"
        return {
            "gpu": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "torch": torch.__version__,
            "triton": package_version("triton"),
            "date": self.date,
        }


@dataclass
class Measurement:
    """The result of one implementation of one case; empty times when it could not run, with the reason."""

    case: Case
    implementation: str
    timing: Timing | None = None
    peak_mib: float | None = None
    limit_ms: float | None = None
    correct: bool | None = None
    errors: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def row(self, run: Run) -> dict[str, Any]:
        """The CSV's row."""
        return {
            "operator": self.case.operator,
            "shape": self.case.shape,
            "dtype": self.case.dtype,
            "implementation": self.implementation,
            "direction": self.case.direction,
            "median_ms": self.timing.median_ms if self.timing else None,
            "peak_mib": None if self.peak_mib is None else round(self.peak_mib, 1),
            "limit_ms": self.limit_ms,
            "correct": self.correct,
            **run.columns(),
        }

    def ours_is_bad(self) -> bool:
        """Our implementation is wrong or did not run."""
        return is_ours(self.implementation) and not self.correct


def run_case(case: Case, run: Run, only: Collection[str] | None = None) -> list[Measurement]:
    """Check and time every implementation of a case (of `only`) on the same inputs.

    What is wrong, fails or is not installed is printed with the reason, and is a result like the others.
    """
    inputs = case.inputs()
    reference = {name: value.detach() for name, value in case.reference(inputs).items()}
    limit = case.limit_ms(run.ceilings) if case.limit_ms else None
    results = []
    for name, make in case.implementations.items():
        if only and name not in only:
            continue
        result = Measurement(case, name, limit_ms=limit)
        try:
            _fill(result, make, inputs, reference, run)
        except Exception as error:  # one peer's failure (absent, out of memory, wrong size) must not end the others
            result.reason = _reason(error)
        if result.reason:
            print(f"{case.operator} {case.shape} {name}: {result.reason}", file=sys.stderr)
        results.append(result)
        _forget(run.device)
    return results


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError) and not (error.name or "").startswith("posttrain"):
        return f"not installed: {error}"
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _fill(result: Measurement, make: Implementation, inputs: Any, reference: Outputs, run: Run) -> None:
    case = result.case
    call, outputs = make(inputs)
    call()  # compiles, and makes handles and workspaces, before the memory is poisoned and measured
    poison_free_memory(run.device)
    result.errors, result.reason = compare(outputs(call()), reference, case.tolerance)
    result.correct = not result.reason
    result.peak_mib = peak_mib(call, run.device)
    short = {"warmup_ms": 0.0, "rep_ms": 20.0, "min_calls": 3} if run.quick else {}
    result.timing = measure(call, run.device, flush=case.flush, graph_calls=case.graph_calls, **short)


def compare(
    outputs: Outputs, reference: Outputs, tolerance: float | Mapping[str, float]
) -> tuple[dict[str, float], str]:
    """Relative errors by name, and what is wrong in one sentence (empty when nothing is)."""
    errors, wrong = {}, []
    for name, expected in reference.items():
        limit = tolerance if isinstance(tolerance, float) else tolerance[name]
        if name not in outputs:
            wrong.append(f"no output {name}")
        elif outputs[name].shape != expected.shape:
            wrong.append(f"{name} has shape {tuple(outputs[name].shape)}, not {tuple(expected.shape)}")
        else:
            errors[name] = relative_error(outputs[name], expected)
            if not errors[name] <= limit:  # NaN is not
                wrong.append(f"{name} off by {errors[name]:.2e}, allowed {limit:.0e}")
    return errors, "wrong: " + ", ".join(wrong) if wrong else ""


def relative_error(output: Tensor, expected: Tensor, chunk: int = 2**26) -> float:
    """‖output − expected‖ / ‖expected‖ (‖output‖ when nothing but zeros is expected), in fp64 a chunk at a time."""
    output, expected = output.detach().reshape(-1), expected.reshape(-1)
    difference, norm = 0.0, 0.0
    for start in range(0, expected.numel(), chunk):
        wanted = expected[start : start + chunk].double()
        difference += float((output[start : start + chunk].to(wanted) - wanted).square().sum())
        norm += float(wanted.square().sum())
    return (difference / norm) ** 0.5 if norm else difference**0.5


def ceiling_rows(measured: MeasuredCeilings, run: Run) -> list[dict[str, Any]]:
    """Rows of the two ceiling measurements, so that every `limit_ms` can be traced to them."""
    parts = (
        ("copy", measured.copy_shape, "uint8", measured.copy),
        ("matmul", measured.matmul_shape, measured.matmul_dtype, measured.matmul),
    )
    return [
        {
            "operator": f"ceiling_{name}",
            "shape": shape,
            "dtype": dtype,
            "implementation": "torch",
            "direction": "fwd",
            "median_ms": timing.median_ms,
            "peak_mib": None,
            "limit_ms": None,
            "correct": True,
            **run.columns(),
        }
        for name, shape, dtype, timing in parts
    ]


def _forget(device: torch.device) -> None:
    """Let no implementation's compiled shapes or cached memory change the next one's figures."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def package_version(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
