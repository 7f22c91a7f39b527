"""Chosen-token log-probability and entropy from hidden states, forward and backward with gradients for both.

Ours is `posttrain.training.logprob`, TRL 1.16's chunked head behind a seam; `trl_tile8192` is the same head with a
smaller tile; `eager` keeps the logits.

Limit: 3 products of tokens x vocabulary x width (projection, two gradients), which needs the logits kept. Without them
a fourth is needed: the weight's gradient wants p once the incoming gradient is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case
from benchmarks.heads import dtype_for, random_heads, shape_text, sizes

TOLERANCE = 3e-2
REFERENCE_TOKENS = 512
NAMES = ("logprobs", "entropy", "grad_h", "grad_w")

Prepared = tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]


@dataclass(frozen=True)
class Inputs:
    """Hidden states [N, D] and head [V, D] with gradients; targets [N]; incoming gradients of both outputs [N]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grads: tuple[Tensor, Tensor]


def cases(device: torch.device, quick: bool) -> list[Case]:
    """One case a size."""
    return [_case(*size, device) for size in sizes(quick)]


def _case(tokens: int, vocab: int, width: int, device: torch.device) -> Case:
    return Case(
        operator="linear_logprob",
        shape=shape_text(tokens, vocab, width),
        dtype=str(dtype_for(device)).removeprefix("torch."),
        direction="fwd+bwd",
        inputs=lambda: _inputs(tokens, vocab, width, device),
        implementations={OURS: ours, "trl_tile8192": lambda inputs: ours(inputs, chunk_size=8192), "eager": eager},
        reference=reference,
        limit_ms=lambda ceilings: ceilings.gemm_ms(3 * 2.0 * tokens * vocab * width),
        tolerance=TOLERANCE,
    )


def _inputs(tokens: int, vocab: int, width: int, device: torch.device) -> Inputs:
    heads = random_heads(tokens, vocab, width, device)
    targets = torch.randint(0, vocab, (tokens,), device=device)
    # signs differ from token to token, as advantages do
    grads = (torch.randn(tokens, device=device) / tokens, torch.randn(tokens, device=device) / tokens)
    return Inputs(heads.student_h, heads.student_w, targets, grads)


def ours(inputs: Inputs, **options: Any) -> Prepared:
    """TRL's chunked head through our seam."""
    from posttrain.training.logprob import token_logprobs

    return _prepared(inputs, lambda: token_logprobs(inputs.hidden, inputs.weight, inputs.targets, **options))


def eager(inputs: Inputs) -> Prepared:
    """Full logits and an fp32 softmax."""

    def outputs() -> tuple[Tensor, Tensor]:
        log_p = (inputs.hidden @ inputs.weight.t()).float().log_softmax(-1)
        return log_p.gather(1, inputs.targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    return _prepared(inputs, outputs)


def _prepared(inputs: Inputs, outputs: Callable[[], tuple[Tensor, Tensor]]) -> Prepared:
    def run() -> tuple[Tensor, ...]:
        values = tuple(outputs())
        gradients = torch.autograd.grad(values, (inputs.hidden, inputs.weight), inputs.grads)
        return (*(value.detach() for value in values), *gradients)

    return run, lambda result: dict(zip(NAMES, result, strict=True))


@torch.no_grad()
def reference(inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp32 (fp64 on a CPU) from the same numbers, a few hundred tokens at a time."""
    wide = torch.float64 if inputs.hidden.device.type == "cpu" else torch.float32
    weight = inputs.weight.to(wide)
    parts: dict[str, list[Tensor]] = {"logprobs": [], "entropy": [], "grad_h": []}
    grad_w = torch.zeros_like(weight)
    for start in range(0, inputs.hidden.shape[0], REFERENCE_TOKENS):
        rows = slice(start, start + REFERENCE_TOKENS)
        hidden, targets = inputs.hidden[rows].to(wide), inputs.targets[rows, None]
        log_p = (hidden @ weight.t()).log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        by_logprob, by_entropy = (grad[rows, None].to(wide) for grad in inputs.grads)
        grad = -by_logprob * p - by_entropy * p * (log_p + entropy[:, None])
        grad.scatter_add_(1, targets, by_logprob)
        parts["logprobs"].append(log_p.gather(1, targets).squeeze(1))
        parts["entropy"].append(entropy)
        parts["grad_h"].append(grad @ weight)
        grad_w.addmm_(grad.t(), hidden)
    return {**{name: torch.cat(values) for name, values in parts.items()}, "grad_w": grad_w}
