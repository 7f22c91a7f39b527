"""Attention of one new token a row over a static cache, for grouped-query and latent attention."""

from .op import decode_attention
from .reference import decode_attention_reference

__all__ = ["decode_attention", "decode_attention_reference"]
