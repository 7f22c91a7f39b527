"""Validators that several training stages share: `_name = model_validator(mode="after")(check)` in their `Config`."""

from __future__ import annotations

from typing import Any


def whole_sequences(config: Any) -> Any:
    """Raises ValueError unless the tokens of a step are whole sequences."""
    if config.tokens_per_step % config.sequence_length:
        below = config.tokens_per_step // config.sequence_length * config.sequence_length
        raise ValueError(
            f"tokens_per_step ({config.tokens_per_step}) must be a multiple of sequence_length "
            f"({config.sequence_length}), e.g. tokens_per_step={below or config.sequence_length}"
        )
    return config


def one_choice_of_weights(config: Any) -> Any:
    """Raises ValueError where both `trainable` and `lora` choose what is trained."""
    if config.lora is not None and config.trainable != "all":
        raise ValueError(
            f"trainable={config.trainable} and lora both choose what is trained: name the layers in "
            "lora.target_modules and leave trainable=all"
        )
    return config


def no_graph_of_trl(config: Any) -> Any:
    """Raises ValueError where a CUDA graph of a loss of TRL's is asked for."""
    if config.cuda_graph == "on":
        raise ValueError("cuda_graph=on: TRL's loss reads the device at every micro-batch; use cuda_graph=auto")
    return config
