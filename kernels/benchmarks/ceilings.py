"""What the device can do at best, measured in the same run as the operators: the physical limits come from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import Timing, measure

H200_COPY_GB_S = 4266.0
"""Device-to-device copy of 2 GiB on one H200, bytes read plus bytes written; used when none is measured."""
H200_MATMUL_TFLOP_S = 670.0
"""bf16 8192³ product on one H200; used when none is measured."""

GIB = 2**30


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device; `limit_ms` of a case is computed from them."""

    copy_gb_s: float = H200_COPY_GB_S
    matmul_tflop_s: float = H200_MATMUL_TFLOP_S

    def bytes_ms(self, count: float) -> float:
        """Least time to move `count` bytes (read plus written) through device memory, in ms."""
        return count / self.copy_gb_s / 1e6

    def gemm_ms(self, flops: float) -> float:
        """Least time for `flops` floating-point operations (2·M·N·K a product) on the matrix units, in ms."""
        return flops / self.matmul_tflop_s / 1e9

    def roofline_ms(self, flops: float, count: float) -> float:
        """The larger of both, in ms."""
        return max(self.gemm_ms(flops), self.bytes_ms(count))


@dataclass(frozen=True)
class MeasuredCeilings:
    """Ceilings with the two measurements they come from, for the CSV."""

    ceilings: Ceilings
    copy: Timing
    matmul: Timing
    copy_shape: str
    matmul_shape: str
    matmul_dtype: str


def measure_ceilings(device: torch.device) -> MeasuredCeilings:
    """Measure copy bandwidth and the matrix-product rate on random data (zeros can run faster).

    On a CPU the sizes are small and the product is fp32: enough for a smoke test, not a statement about the CPU.
    """
    cuda = device.type == "cuda"
    size, side = (2 * GIB, 8192) if cuda else (2**24, 512)
    dtype = torch.bfloat16 if cuda else torch.float32
    copy, matmul = _copy(size, device), _matmul(side, dtype, device)
    return MeasuredCeilings(
        Ceilings(2 * size / copy.median_ms / 1e6, 2 * side**3 / matmul.median_ms / 1e9),
        copy,
        matmul,
        copy_shape=f"{size >> 20} MiB",
        matmul_shape=f"{side}x{side}x{side}",
        matmul_dtype=str(dtype).removeprefix("torch."),
    )


def _copy(size: int, device: torch.device) -> Timing:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), device, flush=False)


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> Timing:
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return measure(lambda: left @ right, device, flush=False)
