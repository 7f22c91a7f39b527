"""Gradients and numbers of several ranks as those of one.

Every rank holds the whole model. What a rank computes is its micro-batches' share of an optimiser step's loss, so
gradients of the ranks are added, not averaged. They are added in buckets whose layout depends on the parameters alone:
torch's `DistributedDataParallel` lays its buckets out anew after the first step, after which sums of three and more
ranks round differently, and a resumed run would not be the uninterrupted one bit for bit. It would also need the loss
to go through the wrapper's `forward`, which chunked losses go around.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 64 * 2**20


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every trained parameter's gradient by the sum over ranks; a missing one counts as zero.

    One that is missing on all ranks becomes zero too, where a single rank would leave the parameter out of the step.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in trained]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Neighbours of one type and device, up to `BUCKET_BYTES` together."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        differs = bucket and (gradient.dtype, gradient.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (differs or size + gradient.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def add_numbers(values: Mapping[str, Tensor | float], device: torch.device) -> dict[str, Tensor]:
    """Every number's sum over ranks, in fp64; all ranks give the same names in the same order."""
    if not values:
        return {}
    summed = torch.stack([torch.as_tensor(value, device=device).detach().double() for value in values.values()])
    dist.all_reduce(summed)
    return dict(zip(values, summed.float().unbind(), strict=True))
