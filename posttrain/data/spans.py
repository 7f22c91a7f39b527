"""Which characters of a row are learnt: rows as text with spans, for any of their three forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import normal_messages
from posttrain.data.pairs import answers_kind
from posttrain.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

IGNORE = -100
"""Label of a token that is not learnt."""


class UnusableRow(ValueError):
    """A row that cannot be trained on in the wanted way; the message says why."""


@dataclass(frozen=True)
class Spans:
    """A row as text.

    Attributes:
        text: what is tokenised; `special`: whether the tokenizer adds its own special tokens to it.
        learnt: [start, end) in characters of what is learnt.
        splits: whether a row that is too long goes on in further sequences, as plain text does.
    """

    text: str
    learnt: tuple[tuple[int, int], ...]
    special: bool
    splits: bool = False


def row_kind(row: dict[str, Any]) -> str:
    """`messages`, `prompt` (with a completion) or `text`.

    Raises:
        UnusableRow: none of them.
    """
    if row.get("messages"):
        return "messages"
    if answers_kind(row) == "preference":
        raise UnusableRow("a preference pair has two answers, and one is to be learnt: the preference stage takes it")
    if "prompt" in row and "completion" in row:
        return "prompt"
    if isinstance(row.get("text"), str):
        return "text"
    fields = ", ".join(sorted(row)) or "none"
    raise UnusableRow(f"a row needs `messages`, `prompt` and `completion`, or `text`; it has {fields}")


def spans(row: dict[str, Any], loss_on: str, tokenizer: PreTrainedTokenizerBase) -> Spans:
    """The row's text and what is learnt of it.

    Raises:
        UnusableRow: the row's form does not have what `loss_on` asks for, or the chat template cannot render it.
    """
    kind = row_kind(row)
    if kind == "messages":
        return chat_spans(_messages(row["messages"]), loss_on, tokenizer)
    if kind == "prompt":
        return _prompt_spans(row["prompt"], row["completion"], loss_on, tokenizer)
    if loss_on != "all":
        raise UnusableRow(f"plain text has no {loss_on} to learn: loss_on=all learns every token")
    return Spans(row["text"], ((0, len(row["text"])),), special=True, splits=True)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises StageError: no EOS, or no offsets, by which an answer's tokens are found."""
    if tokenizer.eos_token_id is None:
        raise StageError("the tokenizer has no EOS token", where="tokenizer", fix="add eos_token to its config")
    if not tokenizer.is_fast:
        raise StageError(
            "the tokenizer does not say which characters a token stands for",
            where="tokenizer",
            fix="a tokenizer with a tokenizer.json",
        )


def encode(row: Spans, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row, EOS at the end: a token has a label if it overlaps a learnt span.

    The first token has none, because in a packed sequence another document's last token would predict it.
    """
    encoded = tokenizer(
        row.text,
        add_special_tokens=row.special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids = list(encoded["input_ids"])
    learnt = [any(a < end and b > start for start, end in row.learnt) for a, b in encoded["offset_mapping"]]
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        learnt.append(False)
    # A row that is learnt to its end is learnt to stop there, whoever wrote the EOS: one that the tokenizer adds
    # itself stands for no characters, and overlaps nothing.
    learnt[-1] |= any(end == len(row.text) for _, end in row.learnt)
    labels = [token if wanted else IGNORE for token, wanted in zip(ids, learnt, strict=True)]
    return ids, [IGNORE, *labels[1:]]


def chat_spans(messages: Messages, loss_on: str, tokenizer: PreTrainedTokenizerBase) -> Spans:
    """A conversation in the tokenizer's template; a turn is learnt from the end of the generation prompt to its EOS."""
    text = _rendered(messages, tokenizer)
    if loss_on == "all":
        return Spans(text, ((0, len(text)),), special=False)
    turns = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not turns:
        raise UnusableRow("the conversation has no assistant turn")
    if loss_on == "completion":
        turns = turns[-1:]
    return Spans(text, tuple(_turn(messages, index, text, tokenizer) for index in turns), special=False)


def _turn(messages: Messages, index: int, text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    if index == 0:
        raise UnusableRow("the conversation begins with an assistant turn, which answers nothing")
    start = _rendered(messages[:index], tokenizer, answer=True)
    end = _rendered(messages[: index + 1], tokenizer)
    if not text.startswith(end) or not end.startswith(start):
        raise UnusableRow(
            "the chat template renders the beginning of a conversation in another way than the whole, so that its "
            "assistant turns cannot be told apart"
        )
    return len(start), len(end)


def _rendered(messages: Messages, tokenizer: PreTrainedTokenizerBase, answer: bool = False) -> str:
    """The conversation in the template, without what follows its last EOS; `answer`: up to where an answer starts."""
    if not tokenizer.chat_template:
        raise UnusableRow("the tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # jinja's errors and those that templates raise have no common base
        raise UnusableRow(f"the chat template refuses the conversation: {error}") from error
    ended = text.rstrip()
    return ended if not answer and tokenizer.eos_token and ended.endswith(tokenizer.eos_token) else text


def _prompt_spans(prompt: Any, completion: Any, loss_on: str, tokenizer: PreTrainedTokenizerBase) -> Spans:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise UnusableRow("the completion is empty")
        if loss_on == "assistant":
            raise UnusableRow("a prompt with a completion as plain strings has no assistant turns: loss_on=completion")
        text = prompt + completion
        return Spans(text, ((0 if loss_on == "all" else len(prompt), len(text)),), special=True)
    before, after = _messages(prompt), _messages(completion)
    if loss_on != "completion":
        return chat_spans(before + after, loss_on, tokenizer)
    text, start = _rendered(before + after, tokenizer), _rendered(before, tokenizer, answer=True)
    if not text.startswith(start):
        raise UnusableRow("the chat template renders a prompt alone in another way than with its completion")
    return Spans(text, ((len(start), len(text)),), special=False)


def _messages(value: Any) -> Messages:
    turns = normal_messages(value)
    if turns is None:
        raise UnusableRow('turns must be [{"role": "user", "content": "..."}, ...] of system, user and assistant')
    return turns
