"""Divergence of two models' next-token distributions from hidden states, without `[tokens, vocabulary]` logits."""

from posttrain_kernels.linear_kl.op import LinearKL, linear_kl
from posttrain_kernels.linear_kl.reference import DIVERGENCES, IGNORE, linear_kl_reference

__all__ = ["DIVERGENCES", "IGNORE", "LinearKL", "linear_kl", "linear_kl_reference"]
