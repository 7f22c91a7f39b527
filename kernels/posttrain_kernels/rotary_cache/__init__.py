"""Rotary embedding of one new token a row, written into the cache in the same pass, for decoding."""

from .op import latent_cache, rotary_cache, rotate
from .reference import latent_cache_reference, rotary_cache_reference, rotate_reference

__all__ = [
    "latent_cache",
    "latent_cache_reference",
    "rotary_cache",
    "rotary_cache_reference",
    "rotate",
    "rotate_reference",
]
