"""SiLU gate in plain torch: the contract, and what the CPU runs."""

from __future__ import annotations

from torch import Tensor, nn


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) · up for gate_up [..., 2I] = (gate, up); silu is rounded to the dtype before the product, as eager."""
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up
