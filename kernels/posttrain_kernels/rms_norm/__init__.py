"""Root-mean-square normalisation with the residual addition in front of it, for decoding."""

from .op import rms_norm
from .reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
