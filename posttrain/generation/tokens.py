"""Token ids on the host: those that end an answer, and those that a model does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain.errors import fail


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: those of the generation settings and the tokenizer's EOS, as far as they exist."""
    eos = model.generation_config.eos_token_id
    own = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    found = dict.fromkeys([*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
    return tuple(token for token in found if 0 <= token < model.config.vocab_size)


def check_ids(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Refuse ids outside the vocabulary: on a GPU they are a device assertion that takes the process along.

    Raises:
        StageError: a prompt is empty, or holds an id that the model does not have.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            fail(f"prompt {number} is empty", fix="begin it with the beginning-of-sequence token")
        for token in (max(prompt), min(prompt)):
            if not 0 <= token < vocabulary:
                fail(
                    f"prompt {number} holds token {token}, which is not in the vocabulary of {vocabulary}: "
                    "tokenizer and model do not belong together",
                    fix="use the tokenizer that was saved with the model",
                )
