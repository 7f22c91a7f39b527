"""The gate of a SwiGLU feed-forward layer on a packed projection, for decoding."""

from .op import silu_mul
from .reference import silu_mul_reference

__all__ = ["silu_mul", "silu_mul_reference"]
