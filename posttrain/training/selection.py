"""Which parameters of a model are trained."""

from __future__ import annotations

from torch import nn

from posttrain.errors import StageError

MIXER = "self_attn"
"""A decoder layer's token mixer, whatever its kind, in the source families and in the upcycled decoder."""


def select_trainable(model: nn.Module, trainable: str) -> int:
    """Freeze what is not trained (`all` or `mixers`); return the number of trainable parameters.

    Raises:
        StageError: the model has no module of a known mixer name.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable == "all" or MIXER in name.split("."))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not count:
        raise StageError(f"no token mixer found in {type(model).__name__}", fix="trainable=all")
    return count
