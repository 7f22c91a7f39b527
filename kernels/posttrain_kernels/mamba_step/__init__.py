"""What stands around `ssd_step` while a Mamba-2 layer decodes: the convolution before it, the gated norm behind it."""

from .op import conv_step, gated_norm
from .reference import conv_step_reference, gated_norm_reference

__all__ = ["conv_step", "conv_step_reference", "gated_norm", "gated_norm_reference"]
