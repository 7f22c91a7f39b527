"""Log-probability of chosen tokens and entropy from hidden states: `[tokens, vocabulary]` logits are never kept.

A thin seam over TRL 1.16's chunked head (`trl.kernels.ChunkedLogProbFunction`): one place that knows its signature, so
that a new TRL breaks one test with a sentence. What that code does:

- It projects in tiles of 4,096 tokens by `chunk_size` vocabulary entries, forward and again backward: 4 products of
  tokens x vocabulary x width, two tiles of memory and the gradients, which it sums in fp32.
- Statistics, outputs and the entropy's gradient are fp32, also for fp64 input.
- **Logits are rounded to the hidden states' dtype (autocast's, under autocast)**: with bf16 a logit of 20 is off by up
  to 0.06 nat. A ratio of two such log-probabilities carries that noise; both must come from this function.
- Its autograd function makes no host synchronisation. The first backward pass imports `trl.trainer.utils` (seconds).
- Weights sharded by ZeRO-3 or FSDP2 must be gathered by the caller for the forward pass.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

from torch import Tensor

from posttrain.errors import StageError

CHUNK_SIZE = 32768
"""Vocabulary entries a tile; TRL's own choice."""

TRL_SIGNATURE = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)


class TokenLogprobs(NamedTuple):
    """Per position, in fp32 and in nats, both with gradients.

    Attributes:
        logprobs: log p(target), `[...]`; 0 without gradient where the target is negative, NaN where it is V or more.
        entropy: −Σ p log p over the vocabulary, `[...]`; None if it was not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk_size: int = CHUNK_SIZE,
) -> TokenLogprobs:
    """log p(target) and entropy of p = softmax(hidden Wᵀ / temperature), with gradients for `hidden` and the head.

    Args:
        hidden: `[..., D]`, what the model's head multiplies (see `plain_head`), already shifted to predict `targets`.
        head_weight: `[V, D]`.
        targets: `[...]` integers; negative ones (-100) mark positions without a target. One that is no token gives
            NaN and is not an error, because looking at it would make the host wait for the device.

    Raises:
        ValueError: shapes that do not match, or a temperature that is not positive.
        ImportError: the installed TRL's function has another signature than the one known here.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"hidden states {tuple(hidden.shape)} and targets {tuple(targets.shape)} differ in positions")
    if hidden.shape[-1] != head_weight.shape[-1]:
        raise ValueError(f"hidden states of width {hidden.shape[-1]} do not fit a head {tuple(head_weight.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    flat = targets.flatten().long().contiguous()
    logprobs, entropies, *_ = _trl_function().apply(
        hidden.flatten(0, -2),
        head_weight,
        None,
        flat,
        temperature,
        min(chunk_size, head_weight.shape[0]),  # TRL allocates whole tiles, also for a small vocabulary
        None,
        1.0,
        ("entropy",) if entropy else (),
    )
    # TRL's code never meets a target of V or more, and returns minus the log-sum-exp for it.
    logprobs = logprobs.masked_fill(flat < 0, 0.0).masked_fill(flat >= head_weight.shape[0], float("nan"))
    return TokenLogprobs(logprobs.view(targets.shape), entropies.view(targets.shape) if entropy else None)


def plain_head(model: Any) -> Tensor:
    """The weight `[V, D]` of a model whose logits are `hidden @ weight.T` and nothing else.

    Raises:
        StageError: the head has a bias, or the model scales or caps its logits.
    """
    head = model.get_output_embeddings()
    odd = ["a head with a bias"] if getattr(head, "bias", None) is not None else []
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        odd += [name] if getattr(model.config, name, None) not in (None, 1, 1.0) else []
    if odd:
        raise StageError(f"{type(model).__name__} has {', '.join(odd)}, which token_logprobs does not know")
    return head.weight


@functools.cache
def _trl_function() -> Any:
    """TRL's autograd function, imported at first use because importing TRL takes a while."""
    import trl
    from trl.kernels import ChunkedLogProbFunction

    found = tuple(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:]  # the first is ctx
    if found != TRL_SIGNATURE:
        raise ImportError(
            f"TRL {trl.__version__} calls its chunked head with {found}; posttrain/training/logprob.py knows "
            f"{TRL_SIGNATURE}: install trl 1.16, or adapt that file and its test"
        )
    return ChunkedLogProbFunction
