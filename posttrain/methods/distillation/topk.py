"""Forward KL to a teacher of whom the k likeliest tokens are kept, the others being one bucket.

With t the teacher's and s the student's distribution at the temperature, K the kept tokens of a position and
t' = 1 − Σ_K t, s' = 1 − Σ_K s the mass of the rest, a position's value is

    D = Σ_{v ∈ K} t_v ln(t_v / s_v) + t' ln(t' / s')

This is the KL after both distributions have sent every token outside K to one symbol, so that by the data-processing
inequality (Cover & Thomas, Elements of Information Theory, 2nd ed., 2.8 and 2.9) 0 ≤ D ≤ KL(t ‖ s): equality at k = V,
and wherever the student shares the rest out as the teacher does. The gradient to the student's logits (times the
temperature) is s − t̂, with t̂ the kept t and the rest t' shared out as the student does: t̂_v = t' s_v / s' outside K.
Without the bucket, and with t scaled up to sum to 1 over K, the student would be taught to give the rest no mass at
all, which is biased (Anshumann et al. 2025, "Sparse Logit Sampling", arXiv:2503.16870); with it the sum of the rest is
taught rightly and only its division is left to the student.

Products, chunks and the sums of gradients are those of `posttrain_kernels.linear_kl`: 3 products with the vocabulary,
the gradient taken with the value. The row step is torch on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from posttrain_kernels.linear_kl import IGNORE, LinearKL, chunked
from torch import Tensor


class TopK(NamedTuple):
    """The teacher at N positions.

    Attributes:
        ids: its k likeliest tokens, the likeliest first, `[N, k]` integers.
        logprobs: their log-probabilities and, last, the logarithm of the mass of all others (-inf: none), `[N, k + 1]`.
    """

    ids: Tensor
    logprobs: Tensor


@torch.no_grad()
def teacher_top_k(hidden: Tensor, head: Tensor, k: int, temperature: float, chunk_tokens: int) -> TopK:
    """What of softmax(hidden @ headᵀ / temperature) is kept, from `[N, D]` and `[V, D]`; log-probabilities are fp32.

    Operands are bf16 as in `linear_kl`, logits fp32 (fp64 for fp64 input). At most `chunk_tokens` rows of logits exist.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    product = chunked.product_dtype(hidden, head, wide)
    ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
    logprobs = torch.empty(len(hidden), k + 1, dtype=wide, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        head = head.to(product)
        most = max(1, min(chunk_tokens, len(hidden), chunked.CHUNK_BYTES // (len(head) * wide.itemsize)))
        buffer = torch.empty(most, len(head), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), most):
            rows = slice(start, start + most)
            part = hidden[rows].to(product)
            logits = buffer[: len(part)]
            chunked.multiply(part, head.t(), logits)
            top = logits.div_(temperature).topk(k)
            rest = _log_rest(logits, top.indices)[0].unsqueeze(1)
            kept = torch.cat([top.values, rest], 1)  # [C, k + 1]
            ids[rows], logprobs[rows] = top.indices, kept - kept.logsumexp(1, keepdim=True)
    return TopK(ids, logprobs)


def linear_top_k_kl(
    student_h: Tensor,
    student_w: Tensor,
    teacher: TopK,
    *,
    temperature: float = 1.0,
    weights: Tensor,
    mask: Tensor,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> LinearKL:
    """Σ weights · D + Σ label_weights · cross-entropy (at temperature 1) of `[N, D]` hidden states and a `[V, D]` head.

    Arguments and result are those of `linear_kl`, but for the teacher, who is scaled to sum to 1 first: rounded
    log-probabilities do not. Gradients go to the student's two tensors; call `backward` once. Nothing waits for the
    device.

    Raises:
        ValueError: the teacher's positions are not the student's, or it keeps more tokens than there are.
    """
    count, vocabulary = len(student_h), len(student_w)
    k = teacher.ids.shape[-1]
    if teacher.ids.shape != (count, k) or teacher.logprobs.shape != (count, k + 1):
        shapes = f"{tuple(teacher.ids.shape)} and {tuple(teacher.logprobs.shape)}"
        raise ValueError(f"the teacher's tokens must be [{count}, k] and [{count}, k + 1], not {shapes}")
    if k > vocabulary:
        raise ValueError(f"the teacher keeps {k} tokens, the student's head has {vocabulary}")
    wide = torch.float64 if student_h.dtype == torch.float64 else torch.float32
    options = _Options(temperature, chunk_tokens, logits_dtype, torch.is_grad_enabled(), wide)
    keep = mask.ne(0)
    shares = (None if share is None else torch.where(keep, share.to(wide), 0.0) for share in (weights, label_weights))
    return LinearKL(*_LinearTopK.apply(student_h, student_w, *teacher, keep, labels, *shares, options))


@dataclass(frozen=True)
class _Options:
    """What the autograd function needs beside tensors; `wide` is the type of values and sums."""

    temperature: float
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    grad: bool
    wide: torch.dtype


class _LinearTopK(torch.autograd.Function):
    """Values and gradients in one pass over the tokens; `backward` only scales what `forward` computed."""

    @staticmethod
    def forward(
        ctx: Any,
        student_h: Tensor,
        student_w: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        keep: Tensor,
        labels: Tensor | None,
        weights: Tensor,
        label_weights: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        wide = options.wide
        need_h, need_w = (options.grad and needed for needed in ctx.needs_input_grad[:2])
        product = chunked.product_dtype(student_h, student_w, wide)
        with torch.autocast(student_h.device.type, enabled=False):
            gradients = chunked.Gradients(student_h, student_w, product, need_h, need_w, wide)
            values = torch.empty_like(weights)
            ce = torch.empty_like(weights) if labels is not None else None
            narrow = chunked.logits_dtype(product, wide, options.logits_dtype)
            bounds = chunked.chunk_rows(len(student_w), narrow, options.chunk_tokens)
            chunks = list(chunked.even_chunks(len(weights), *bounds))
            most = max(map(len, chunks), default=0)
            buffer = torch.empty(most, len(student_w), dtype=narrow, device=student_h.device)
            for chunk in chunks:
                rows = slice(chunk.start, chunk.stop)
                hidden = chunked.kept_hidden(student_h[rows], product, keep, rows)
                logits = buffer[: len(chunk)]
                chunked.multiply(hidden, gradients.head.t(), logits)
                logits, grad = logits.to(wide), None
                if ce is not None:
                    found, grad = _cross_entropy(logits, labels[rows], label_weights[rows])
                    ce[rows] = found.where(keep[rows], 0)
                teacher = TopK(ids[rows].long(), logprobs[rows].to(wide))
                values[rows] = _row_step(logits, teacher, weights[rows], options.temperature).where(keep[rows], 0)
                if need_h or need_w:
                    gradients.add(rows, hidden, (logits if grad is None else logits.add_(grad)).to(product))
        ctx.save_for_backward(*gradients.finish(student_w.dtype))
        ctx.set_materialize_grads(False)
        loss = chunked.weighted_sum(values, weights)
        if ce is not None:
            loss = loss + chunked.weighted_sum(ce, label_weights)
        ctx.mark_non_differentiable(*(out for out in (values, ce) if out is not None))
        return loss.to(wide), values, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        scaled = [None if grad is None else chunked.scale_gradient(grad, grad_loss) for grad in ctx.saved_tensors]
        return *scaled, *(None,) * 7


def _row_step(logits: Tensor, teacher: TopK, weights: Tensor, temperature: float) -> Tensor:
    """D `[C]` of `[C, V]` logits, over which its gradient times `weights` is written."""
    log_t = teacher.logprobs - teacher.logprobs.logsumexp(1, keepdim=True)
    kept = logits.div_(temperature).gather(1, teacher.ids)
    rest, total = _log_rest(logits, teacher.ids)  # logits are now exp(z - their largest) of the rest, 0 on K
    log_s = torch.cat([kept, rest.unsqueeze(1)], 1)
    log_s = log_s - log_s.logsumexp(1, keepdim=True)  # [C, k + 1]
    t = log_t.exp()
    values = torch.where(t > 0, t * (log_t - log_s), 0.0).sum(1)
    gap = (log_s.exp() - t) * (weights / temperature).unsqueeze(1)
    # total is 0 where no token is left over; the gap is 0 there too.
    logits.mul_(gap[:, -1:] / total.clamp_min(torch.finfo(logits.dtype).tiny).unsqueeze(1))
    logits.scatter_(1, teacher.ids, gap[:, :-1])
    return values


def _log_rest(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the logits outside `ids` `[C, k]`: log-sum-exp `[C]` (-inf: none are left), and Σ exp(z − largest) `[C]`.

    The logits are overwritten by exp(z − largest), 0 on `ids`. The mass of the rest comes from the rest itself: one
    minus the kept mass would lose it to rounding where it is small.
    """
    largest = logits.scatter_(1, ids, -torch.inf).amax(1).clamp_min(torch.finfo(logits.dtype).min)
    total = logits.sub_(largest.unsqueeze(1)).exp_().sum(1)
    return largest + total.log(), total


def _cross_entropy(logits: Tensor, labels: Tensor, label_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy `[C]` at temperature 1, and its weighted gradient to the logits `[C, V]`."""
    log_p = torch.log_softmax(logits, -1)
    valid = labels.ne(IGNORE)
    target = labels.where(valid, 0).unsqueeze(1)
    ce = -log_p.gather(1, target).squeeze(1) * valid
    p = log_p.exp_()
    return ce, p.scatter_(1, target, p.gather(1, target) - 1).mul_((label_weights * valid).unsqueeze(1))
