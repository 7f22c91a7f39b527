"""One rank's word for all, where ranks could see different things: a file, a clock."""

from __future__ import annotations

import json
from typing import Any


def agree(value: Any, group: Any = None) -> Any:
    """The first rank's value on all ranks: something JSON can hold. None returns before all have come here.

    `group`: a gloo group of all ranks. With the GPUs' own group every question would wait for the device.
    """
    import torch
    import torch.distributed as dist

    first = dist.get_rank() == 0
    text = json.dumps(value).encode() if first else b""
    # A sum, to which the others add 0: unlike a broadcast it keeps the first rank waiting for them too.
    length = torch.tensor([len(text)])
    dist.all_reduce(length, group=group)
    content = torch.empty(int(length), dtype=torch.uint8)
    if first:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(content, 0, group=group)
    return json.loads(bytes(content.tolist()))
