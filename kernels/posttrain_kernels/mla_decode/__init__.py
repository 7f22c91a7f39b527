"""Latent attention of one new token a row over a static cache of latents and rotary keys, in latent space."""

from .op import mla_decode
from .reference import mla_decode_reference

__all__ = ["mla_decode", "mla_decode_reference"]
