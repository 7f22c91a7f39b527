"""The contract of `linear_kl` in plain torch: full logits, differentiable, in the precision of its input (fp64 too)."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
IGNORE = -100


def linear_kl_reference(
    student_h: Tensor,
    student_w: Tensor,
    teacher_h: Tensor,
    teacher_w: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(loss, divergence [N], cross_entropy [N] or None)` as `linear_kl` defines them, all differentiable.

    Rows of hidden states that the mask leaves out must be finite here: autograd multiplies their gradient by 0.
    """
    zs, zt = student_h @ student_w.T, (teacher_h @ teacher_w.T).detach()  # [N, V]
    log_s, log_t = (zs / temperature).log_softmax(-1), (zt / temperature).log_softmax(-1)
    values = _divergence(log_s, log_t, divergence, beta)
    if mask is not None:
        values = values * mask.ne(0)
    loss = (values if weights is None else values * weights).sum()
    if labels is None:
        return loss, values, None
    valid = labels.ne(IGNORE)
    ce = -zs.log_softmax(-1).gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1) * valid
    if mask is not None:
        ce = ce * mask.ne(0)
    return loss + (ce if label_weights is None else ce * label_weights).sum(), values, ce


def _divergence(log_s: Tensor, log_t: Tensor, divergence: str, beta: float) -> Tensor:
    """`[N]` nats of two `[N, V]` log-distributions."""
    if divergence == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if divergence == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = torch.logaddexp(log_t + log(beta), log_s + log(1 - beta))
    to_teacher, to_student = (log_t.exp() * (log_t - log_m)).sum(-1), (log_s.exp() * (log_s - log_m)).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student
