"""The row step of `linear_kl` in torch: values, and the gradient to the student's logits written over them.

Formulas as in `kernels.py`, which takes this step on CUDA; here each term is a few passes over preallocated `[C, V]`
buffers, because on a CPU a fresh buffer costs as much as a pass (the kernel hands it out page by page).
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_kernels.linear_kl.reference import IGNORE


class TorchRows:
    """Buffers for chunks of up to `rows` tokens, and the row step on them.

    `student` and `teacher` `[rows, V]` take the logits in fp32 (fp64 for fp64 operands).
    """

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, labelled: bool) -> None:
        buffers = (torch.empty(rows, vocabulary, dtype=dtype, device=device) for _ in range(4 if labelled else 3))
        self.student, self.teacher, self._spare, *rest = buffers
        self._label_grad = rest[0] if rest else None

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

        `weights` and `label_weights` are `[C]` in the buffers' type, 0 where `keep` is; the buffers are overwritten.
        """
        count = weights.shape[0]
        student, teacher, spare = self.student[:count], self.teacher[:count], self._spare[:count]
        ce = grad_ce = None
        if labels is not None:
            ce, grad_ce = _cross_entropy(student, labels, label_weights, self._label_grad[:count], want_grad)
        log_s, log_t = _log_softmax_(student, temperature), _log_softmax_(teacher, temperature)
        rows = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}[divergence]
        scale = (weights / temperature).unsqueeze(1) if want_grad else None
        values, grad = rows(log_s, log_t, spare, beta, scale)
        if grad is not None and grad_ce is not None:
            grad.add_(grad_ce)
        if keep is not None:
            values, ce = values.where(keep, 0), ce.where(keep, 0) if ce is not None else None
        return values, ce, grad


def _log_softmax_(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits.div_(temperature)
    return torch.log_softmax(logits, -1, out=logits)


def _forward_kl(log_s: Tensor, log_t: Tensor, spare: Tensor, _: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    t = torch.exp(log_t, out=spare)
    values = log_t.sub_(log_s).mul_(t).sum(-1)
    return values, None if scale is None else log_s.exp_().sub_(t).mul_(scale)


def _reverse_kl(log_s: Tensor, log_t: Tensor, spare: Tensor, _: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    gap = torch.sub(log_s, log_t, out=log_t)
    s = torch.exp(log_s, out=log_s)
    values = torch.mul(s, gap, out=spare).sum(-1)
    return values, None if scale is None else gap.sub_(values.unsqueeze(1)).mul_(s).mul_(scale)


def _jsd(log_s: Tensor, log_t: Tensor, spare: Tensor, beta: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    # log m from probabilities: where both underflow the clamp keeps the logarithm finite and the term is 0 · finite.
    tiny = torch.finfo(spare.dtype).tiny
    t = torch.exp(log_t, out=spare)
    s = log_s.exp()
    log_m = torch.lerp(s, t, beta).clamp_min_(tiny).log_()
    to_teacher = log_t.sub_(log_m).mul_(t).sum(-1)
    gap = log_s.sub_(log_m)
    to_student = torch.mul(s, gap, out=spare).sum(-1)
    values = beta * to_teacher + (1 - beta) * to_student
    return values, None if scale is None else gap.sub_(to_student.unsqueeze(1)).mul_(s).mul_((1 - beta) * scale)


def _cross_entropy(
    logits: Tensor, labels: Tensor, label_weights: Tensor, buffer: Tensor, want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy `[C]` at temperature 1, and its weighted gradient to the logits, in `buffer`."""
    log_p = torch.log_softmax(logits, -1, out=buffer)
    valid = labels.ne(IGNORE)
    target = labels.where(valid, 0).unsqueeze(1)  # [C, 1]
    ce = -log_p.gather(1, target).squeeze(1) * valid
    if not want_grad:
        return ce, None
    p = log_p.exp_()
    return ce, p.scatter_(1, target, p.gather(1, target) - 1).mul_((label_weights * valid).unsqueeze(1))
