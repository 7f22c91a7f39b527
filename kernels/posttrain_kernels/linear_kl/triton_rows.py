"""Buffers for the Triton row step of `linear_kl`, and its launches."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_kernels.dispatch import on_own_device

# (ROWS, LANES, num_warps) of a tile by logits type. LANES = warps · 32 threads · 8 entries (16 bytes of bf16 gradient)
# keeps a lane in one thread; fewer lanes make every step of the loop exchange data between threads.
TILES = {torch.bfloat16: (4, 2048, 8), torch.float32: (2, 2048, 8)}


class TritonRows:
    """Buffers for chunks of up to `rows` tokens, and the row step on them.

    `student` and `teacher` `[rows, V]` take the logits in `logits_dtype`. The gradient, in `grad_dtype`, goes over the
    student's logits when the types agree, else (bf16 gradient of fp32 logits) over the first half of the teacher's
    rows; only split programs, which would overwrite each other's logits there, take a buffer of their own.
    """

    def __init__(
        self, rows: int, vocabulary: int, logits_dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device
    ) -> None:
        # Rows start at a multiple of 128 bytes, for wide loads and for cuBLAS whatever the vocabulary.
        stride = -(-vocabulary // 64) * 64
        student = torch.empty(rows, stride, dtype=logits_dtype, device=device)
        teacher = torch.empty(rows, stride, dtype=logits_dtype, device=device)
        self.student, self.teacher = student[:, :vocabulary], teacher[:, :vocabulary]
        self._over_teacher = logits_dtype != grad_dtype
        self._grad = teacher.view(grad_dtype)[:, :vocabulary] if self._over_teacher else self.student

    @on_own_device
    def step(
        self,
        weights: Tensor,
        keep: Tensor | None,
        labels: Tensor | None,
        label_weights: Tensor | None,
        *,
        divergence: str,
        beta: float,
        temperature: float,
        want_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`(divergence [C], cross_entropy [C] or None, gradient [C, V] or None)` of the chunk in the buffers.

        `weights` and `label_weights` are fp32 `[C]`; rows where `keep` is 0 get zeros; the buffers are overwritten.
        """
        from posttrain_kernels.linear_kl.kernels import KINDS, two_pass_kernel

        count, n = weights.shape[0], self.student.shape[1]
        values = torch.empty(count, dtype=torch.float32, device=weights.device)
        ce = torch.empty_like(values) if labels is not None else None
        # Absent tensors are not read: any pointer does.
        keep_ = keep.view(torch.int8) if keep is not None else weights
        labels_, label_weights_ = (labels, label_weights) if labels is not None else (weights, weights)
        tile, lanes, warps = TILES[self.student.dtype]
        two_pass_kernel[(count,)](
            self.student, self.teacher, self._grad,
            self.student.stride(0), self.teacher.stride(0), self._grad.stride(0),
            weights, keep_, labels_, label_weights_, values, ce if ce is not None else values,
            n, float(temperature), float(beta),
            KIND=KINDS[divergence], HAS_KEEP=keep is not None, HAS_CE=labels is not None, TEMPERED=temperature != 1.0,
            GRAD=want_grad, BARRIER=self._over_teacher, ROWS=tile, LANES=lanes, num_warps=warps,
        )  # fmt: skip
        return values, ce, self._grad[:count] if want_grad else None
