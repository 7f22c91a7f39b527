"""A step's numbers on their way from the device to the log, without the step waiting for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LAG = 2
"""Steps whose numbers may be on their way on a GPU: so far the host runs ahead, and so late it learns of a NaN."""


@dataclass(frozen=True)
class Reading:
    """The numbers of one optimiser step."""

    step: int
    epoch: float
    values: dict[str, float]


@dataclass
class _Pending:
    step: int
    epoch: float
    known: dict[str, float]
    names: list[str]
    host: Tensor | None
    arrived: Any


class Meter:
    """A queue of steps' numbers: `push` never waits for the device, `pop` gives them back in order as they arrive.

    With `lag=0`, right on a CPU, a step can be read as soon as it is pushed. Otherwise its tensors are copied to pinned
    memory in the stream's order, and `pop` waits only for steps that lie more than `lag` behind the newest: this also
    bounds how far the host runs ahead of the device.
    """

    def __init__(self, lag: int = 0) -> None:
        self.lag = lag
        self._pending: deque[_Pending] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, step: int, epoch: float, values: Mapping[str, Tensor | float]) -> None:
        """Take a step's scalars. Tensors may be changed in place afterwards: they are copied in the stream's order."""
        known = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
        host, arrived = _send(list(tensors.values())) if tensors else (None, None)
        self._pending.append(_Pending(step, epoch, known, list(tensors), host, arrived))

    def pop(self, flush: bool = False) -> Iterator[Reading]:
        """The steps that have arrived, oldest first, waiting for those beyond the lag; all of them with `flush`."""
        while self._pending:
            oldest = self._pending[0]
            must = flush or len(self._pending) > self.lag
            if not must and not (oldest.arrived is not None and oldest.arrived.query()):
                return
            yield self._read(self._pending.popleft())

    def _read(self, pending: _Pending) -> Reading:
        """The only place of a training loop that waits for the device."""
        if pending.arrived is not None:
            pending.arrived.synchronize()
        numbers = pending.host.tolist() if pending.host is not None else []
        return Reading(pending.step, pending.epoch, {**dict(zip(pending.names, numbers, strict=True)), **pending.known})


def _send(tensors: list[Tensor]) -> tuple[Tensor, Any]:
    """Scalars as one fp64 tensor [n] in host memory, which holds fp32 exactly, and the event of its arrival."""
    packed = torch.stack([tensor.double() for tensor in tensors])
    if packed.device.type != "cuda":
        return packed, None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
