"""Conversations: one normal form, a plain text of them, and the model's own format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
TEMPLATE_DATE = "01 Jan 2025"
"""Given to chat templates that print today's date, which would change prompts and answers from day to day."""

_OTHER_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "prompter": "user"}


def normal_messages(value: Any) -> list[dict[str, str]] | None:
    """Turns as `[{"role", "content"}]`, from that form or from `[{"from", "value"}]`; None if it is neither."""
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            return None
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES or not isinstance(content, str):
            return None
        turns.append({"role": role, "content": content})
    return turns


def unreadable_turn(value: Any) -> str | None:
    """What is wrong with turns that `normal_messages` cannot read; None for what is no list of turns at all."""
    if not isinstance(value, list) or not value:
        return "there is no turn in it" if value == [] else None
    for number, turn in enumerate(value, start=1):
        if normal_messages([turn]) is not None:
            continue
        if not isinstance(turn, dict):
            return f"turn {number} is no object"
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(content, str):
            kind = "null or absent" if content is None else f"a {type(content).__name__}"
            return f"the content of turn {number} is {kind}, not a text"
        return f"turn {number} has the role {role!r}"
    return None


def plain_text(messages: list[dict[str, str]]) -> str:
    """A conversation as role-tagged text, for counting and for tokenizers without a chat template."""
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A conversation in the tokenizer's chat template, special tokens included; None if it has no template.

    What the template writes after the last turn's EOS (often a newline) is left out: it separates turns.
    """
    if not tokenizer.chat_template:
        return None
    return tokenizer.apply_chat_template(messages, tokenize=False).rstrip()


def continued_text(
    prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **template: Any
) -> tuple[str, bool]:
    """What a model that answers a prompt continues, and whether special tokens are to be added when it is tokenised.

    Turns are rendered by the tokenizer's chat template up to where the assistant's turn begins, or, without a template,
    as the role-tagged text that `plain_text` writes. A text is continued as it is.

    Args:
        template: variables for the template, e.g. a date.
    """
    if isinstance(prompt, str):
        return prompt, True
    if not tokenizer.chat_template:
        return f"{plain_text(prompt)}\n\nAssistant:", True
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template)
    return text, False
