"""What losses over a vocabulary share: chunks of tokens, the products' types, and the student's gradients.

A loss walks `even_chunks` of rows, has each chunk's logits in one buffer (`multiply`, `logits_dtype`), turns them into
their gradient and hands it to `Gradients`; its `backward` is `scale_gradient`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from posttrain_kernels.dispatch import use_triton

# Both models' logits of a chunk, together. At a vocabulary of 128,256 this leaves the operator under 1 GiB.
CHUNK_BYTES = 480 * 2**20
# Chunks are whole tiles of the matrix products: a tile of 128 rows that is half empty costs as much as a full one.
CHUNK_UNIT = 128
# The head's gradient of a bf16 head adds up in bf16, once a chunk. True: in fp32, for 4 more bytes a weight.
WIDE_HEAD_GRADIENT = False


class Gradients:
    """The student's gradients, filled chunk by chunk; None where not needed.

    Attributes:
        head: `[V, Ds]`, the student's head as an operand of products.
        h, w: the gradients to the hidden states `[N, Ds]` and to the head `[V, Ds]`.
    """

    def __init__(
        self, student_h: Tensor, student_w: Tensor, product: torch.dtype, need_h: bool, need_w: bool, wide: torch.dtype
    ) -> None:
        self.head = student_w.to(product)
        self.h = torch.empty(student_h.shape, dtype=student_h.dtype, device=student_h.device) if need_h else None
        narrow = student_w.dtype == product and student_w.is_cuda and not WIDE_HEAD_GRADIENT
        self.w = student_w.new_empty(student_w.shape, dtype=product if narrow else wide) if need_w else None
        self._wide, self._first = wide, True

    def add(self, rows: slice, hidden: Tensor, grad: Tensor) -> None:
        """`grad` `[C, V]` is the gradient to the logits of `hidden` `[C, Ds]`."""
        if self.h is not None:
            out = self.h[rows]
            if out.dtype in (grad.dtype, self._wide):
                multiply(grad, self.head, out)
            else:
                out.copy_(grad @ self.head)
        if self.w is not None:
            # The first chunk writes: no pass to clear the gradient, none to read the zeros back.
            (multiply if self._first else _accumulate)(grad.t(), hidden, self.w)
            self._first = False

    def finish(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients, the head's in `dtype`."""
        if self.w is not None and self._first:
            self.w.zero_()
        return self.h, self.w.to(dtype) if self.w is not None else None


def scale_gradient(grad: Tensor, factor: Tensor) -> Tensor:
    """`grad` times a scalar, in place: a scaled copy of the head's gradient would be the largest tensor twice."""
    if grad.dtype == torch.float64 or not use_triton(grad, factor):
        return grad.mul_(factor.to(grad.dtype))
    from posttrain_kernels.linear_kl.scale import scale_in_place

    return scale_in_place(grad, factor)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out = left @ right`, in out's precision."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _accumulate(left: Tensor, right: Tensor, total: Tensor) -> None:
    """`total += left @ right` without rounding the product first: bf16 products of chunks would bias the sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def product_dtype(hidden: Tensor, head: Tensor, wide: torch.dtype) -> torch.dtype:
    """bf16 on CUDA under bf16 autocast or for bf16 hidden states; `wide` elsewhere, and where the row step is torch's.

    On a CPU no product of bf16 operands gives fp32 results, and the torch row step has logits and gradients in `wide`.
    """
    if not hidden.is_cuda or not on_triton(hidden, head, wide):
        return wide
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    return dtype if dtype == torch.bfloat16 else wide  # fp16 would lose gradients of a mean over many tokens


def kept_hidden(hidden: Tensor, product: torch.dtype, keep: Tensor | None, rows: slice) -> Tensor:
    """A chunk's hidden states `[C, D]`; zeros in rows that `keep` `[N]` leaves out: 0 · NaN would reach the head."""
    hidden = hidden.to(product)
    return hidden if keep is None else torch.where(keep[rows].unsqueeze(1), hidden, 0)


def on_triton(student_h: Tensor, student_w: Tensor, wide: torch.dtype) -> bool:
    """Whether the row step is Triton's; it has no fp64."""
    return wide == torch.float32 and use_triton(student_h, student_w)


def logits_dtype(product: torch.dtype, wide: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Type of the logits of `product` operands: bf16 operands may have another that is `wanted`."""
    return wanted or product if product == torch.bfloat16 else wide


def chunk_rows(vocabulary: int, logits: torch.dtype, chunk_tokens: int | None) -> tuple[int, int]:
    """(most rows of a chunk, the unit it is a multiple of), for two models' logits within `CHUNK_BYTES`."""
    most = max(1, CHUNK_BYTES // (2 * vocabulary * logits.itemsize))
    if chunk_tokens is not None:
        most = min(most, max(1, chunk_tokens))
    unit = min(most, CHUNK_UNIT)
    return most // unit * unit, unit


def even_chunks(count: int, most: int, unit: int) -> Iterator[range]:
    """Rows in chunks of at most `most`, whole units (but for the last rows) and as even as they can be."""
    units = -(-count // unit)
    parts = -(-units * unit // most)
    if not parts:
        return
    starts = [index * units // parts * unit for index in range(parts)]
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        yield range(start, stop)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · values in fp64, where a weight of 0 silences a value that is not finite."""
    return torch.where(weights != 0, values.double() * weights, 0.0).sum()
