"""Distillation loss from hidden states, forward and backward: mean over tokens of KL(teacher || student), T = 1.

Operands are bf16, and all softmaxes fp32. What differs is whether the product rounds the logits to bf16 in between:

| logits | implementations |
|---|---|
| bf16 | `posttrain` (operator default), `eager`, `liger_chunked*`, `liger_fused_jsd` (then cast to fp32), `fla*` |
| fp32 | `posttrain_fp32_logits` (what distillation runs by default), `trl_chunked` |

What the peers are, read in their sources (liger-kernel 0.8.5, fla-core 0.6.0, TRL 1.16.0):

- `liger_chunked` (`LigerFusedLinearJSDLoss`, beta 0): mean over labelled tokens; gradients in the forward pass,
  compiled, summed in bf16. Chunks of 1,024 tokens by default; 4,096 is measured too, for its best.
- `liger_fused_jsd` (`LigerFusedLinearJSD`, beta 0): mean over tokens, gradients summed in bf16; its chunks are about
  N·D/V tokens on Hopper.
- `trl_chunked` (`ChunkedDivergenceFunction`, beta 0): per token; projects both models twice (6 products).
- `fla` (`FusedKLDivLoss`): mean over tokens; the head's gradient is an fp32 product by default, which is slow;
  `fla_bf16_sum` turns that off. Arguments: (student, teacher) hidden states, then (student, teacher) heads.
- `eager`: full logits of all tokens.

Limit: 4 products of tokens x vocabulary x width (two projections, two gradients) at the measured rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case
from benchmarks.heads import Heads, dtype_for, random_heads, shape_text, sizes

TOLERANCE = 3e-2
"""Twice the error of eager bf16 gradients (1.5e-2 with these logits); a wrong scale or a lost term is far above."""
REFERENCE_TOKENS = 512

Prepared = tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """One case a size."""
    return [_case(*size, device) for size in sizes(quick)]


def _case(tokens: int, vocab: int, width: int, device: torch.device) -> Case:
    return Case(
        operator="linear_kl",
        shape=shape_text(tokens, vocab, width),
        dtype=str(dtype_for(device)).removeprefix("torch."),
        direction="fwd+bwd",
        inputs=lambda: random_heads(tokens, vocab, width, device),
        implementations={
            OURS: ours,
            f"{OURS}_fp32_logits": lambda heads: ours(heads, torch.float32),
            "eager": eager,
            "liger_chunked": lambda heads: liger_chunked(heads, 1024),
            "liger_chunked_4096": lambda heads: liger_chunked(heads, 4096),
            "liger_fused_jsd": liger_fused_jsd,
            "trl_chunked": trl_chunked,
            "fla": lambda heads: fla(heads, fp32_sum=True),
            "fla_bf16_sum": lambda heads: fla(heads, fp32_sum=False),
        },
        reference=reference,
        limit_ms=lambda ceilings: ceilings.gemm_ms(4 * 2.0 * tokens * vocab * width),
        tolerance=TOLERANCE,
    )


def ours(heads: Heads, logits_dtype: torch.dtype | None = None) -> Prepared:
    """`posttrain_kernels.linear_kl`; the mean is taken by weights of the tokens."""
    from posttrain_kernels.linear_kl import linear_kl

    tokens = heads.student_h.shape[0]
    weights = torch.full((tokens,), 1.0 / tokens, device=heads.student_h.device)
    return _prepared(
        heads,
        lambda: (
            linear_kl(
                heads.student_h,
                heads.student_w,
                heads.teacher_h,
                heads.teacher_w,
                divergence="forward_kl",
                weights=weights,
                logits_dtype=logits_dtype,
            ).loss
        ),
    )


def eager(heads: Heads) -> Prepared:
    """Full logits and an fp32 softmax of each model."""

    def loss() -> Tensor:
        log_p = (heads.student_h @ heads.student_w.t()).float().log_softmax(-1)
        log_q = (heads.teacher_h @ heads.teacher_w.t()).float().log_softmax(-1)
        return torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    return _prepared(heads, loss)


def liger_chunked(heads: Heads, chunk: int) -> Prepared:
    """Liger's chunked generalised JSD at beta 0, without its hard loss; a label everywhere, so no token is ignored."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=chunk)
    labels = torch.zeros(heads.student_h.shape[0], dtype=torch.long, device=heads.student_h.device)
    return _prepared(heads, lambda: module(*heads.student, heads.teacher_h, heads.teacher_w, labels))


def liger_fused_jsd(heads: Heads) -> Prepared:
    """Liger's fused linear JSD at beta 0."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.0)
    return _prepared(heads, lambda: module(*heads.student, heads.teacher_h, heads.teacher_w, None))


def trl_chunked(heads: Heads) -> Prepared:
    """TRL's chunked divergence at beta 0."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss() -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            *heads.student, None, heads.teacher_h, heads.teacher_w, None, 0.0, 1.0
        )
        return divergence.mean()

    return _prepared(heads, loss)


def fla(heads: Heads, fp32_sum: bool) -> Prepared:
    """flash-linear-attention's fused KL."""
    from fla.modules.fused_kl_div import FusedKLDivLoss

    module = FusedKLDivLoss(accumulate_grad_in_fp32=fp32_sum)
    return _prepared(heads, lambda: module(heads.student_h, heads.teacher_h, heads.student_w, heads.teacher_w))


def _prepared(heads: Heads, loss: Callable[[], Tensor]) -> Prepared:
    """Forward and backward of a scalar; the gradients are results, so they count as memory."""

    def run() -> tuple[Tensor, ...]:
        value = loss()
        return (value.detach(), *torch.autograd.grad(value, heads.student))

    return run, lambda result: dict(zip(("loss", "grad_h", "grad_w"), result, strict=True))


@torch.no_grad()
def reference(heads: Heads) -> dict[str, Tensor]:
    """Loss and gradients in fp32 (fp64 on a CPU) from the same numbers, a few hundred tokens at a time."""
    wide = torch.float64 if heads.student_h.device.type == "cpu" else torch.float32
    student_w, teacher_w = heads.student_w.to(wide), heads.teacher_w.to(wide)
    tokens = heads.student_h.shape[0]
    loss = torch.zeros((), dtype=torch.float64, device=student_w.device)
    grad_h, grad_w = [], torch.zeros_like(student_w)
    for start in range(0, tokens, REFERENCE_TOKENS):
        rows = slice(start, start + REFERENCE_TOKENS)
        hidden = heads.student_h[rows].to(wide)
        log_p = (hidden @ student_w.t()).log_softmax(-1)
        log_q = (heads.teacher_h[rows].to(wide) @ teacher_w.t()).log_softmax(-1)
        loss += (log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64) / tokens
        grad = (log_p.exp() - log_q.exp()) / tokens
        grad_h.append(grad @ student_w)
        grad_w.addmm_(grad.t(), hidden)
    return {"loss": loss, "grad_h": torch.cat(grad_h), "grad_w": grad_w}
