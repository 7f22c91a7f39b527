"""Median time and peak memory of a callable: CUDA events on a GPU, the host's clock on a CPU (smoke tests only)."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIB = 2**20
CACHE_BYTES = 256 * MIB
"""Written between two timed calls, so that no call finds its inputs in the L2 cache (50 MiB on an H200)."""


@dataclass(frozen=True)
class Timing:
    """Times of single calls in ms: median, and the 10th and 90th percentile as the spread."""

    median_ms: float
    low_ms: float
    high_ms: float
    calls: int


def measure(
    run: Callable[[], Any],
    device: torch.device,
    *,
    warmup_ms: float = 200.0,
    rep_ms: float = 1000.0,
    min_calls: int = 7,
    max_calls: int = 200,
    flush: bool = True,
    graph_calls: int = 0,
) -> Timing:
    """Time `run()`, whose result is dropped at once.

    Args:
        warmup_ms: at least this long after the first call, which may compile.
        rep_ms: about this long, within `min_calls` and `max_calls`.
        flush: overwrite the L2 cache before each call (GPU only).
        graph_calls: when positive, capture that many calls in one CUDA graph and time its replays, per call: for
            operators so small that launching them takes longer than running them. The calls of one replay follow each
            other without a flush, so `run` must rotate among inputs larger than the cache if it reads from memory.
    """
    run()
    if graph_calls and device.type == "cuda":
        run = captured(run, graph_calls)
    else:
        graph_calls = 0
    once = _timed_calls(run, device, 3, flush)[-1]
    _timed_calls(run, device, _count(warmup_ms, once, 1, max_calls), flush)
    times = _timed_calls(run, device, _count(rep_ms, once, min_calls, max_calls), flush)
    times = sorted(t / max(graph_calls, 1) for t in times)
    return Timing(
        statistics.median(times), times[len(times) // 10], times[len(times) - 1 - len(times) // 10], len(times)
    )


def captured(run: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
    """What replays a CUDA graph of that many calls of `run`, which has run once on a side stream before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Largest device memory during one call above what was allocated before it, results included; None on a CPU.

    Call it after a warm-up call, so that handles and workspaces exist already.
    """
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return (peak - before) / MIB


def poison_free_memory(device: torch.device) -> None:
    """Fill memory that the allocator hands out next with NaN, so that a buffer a kernel forgets to write shows."""
    if device.type != "cuda":
        return
    large = min(2**31, torch.cuda.mem_get_info(device)[0] // 4)
    blocks = [torch.full((large // 4,), float("nan"), device=device)]
    blocks += [torch.full((2**15,), float("nan"), device=device) for _ in range(64)]  # allocator's pool below 1 MiB
    del blocks
    torch.cuda.synchronize(device)


def _timed_calls(run: Callable[[], Any], device: torch.device, count: int, flush: bool) -> list[float]:
    if device.type != "cuda":
        return [_host_call(run) for _ in range(count)]
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device) if flush else None
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        if cache is not None:
            cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _host_call(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _count(budget_ms: float, once_ms: float, least: int, most: int) -> int:
    return max(least, min(most, round(budget_ms / max(once_ms, 1e-3))))
