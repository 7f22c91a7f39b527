"""From the rows of a dataset artifact to the prompts of a policy-gradient run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from posttrain.data.chat import normal_messages
from posttrain.data.reading import iter_rows
from posttrain.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROMPT, ROW = "prompt", "row"
"""Columns of the trainer's rows: what TRL's chat template or tokenizer gets, and the artifact's row as JSON, because
tasks differ in their fields and a table's columns may not."""


@dataclass
class Prompts:
    """What a run may ask.

    Attributes:
        rows: `prompt` and `row` of every question.
        tokens: of all prompts together; `longest` of them.
        unusable: reasons for leaving rows out.
    """

    rows: Dataset
    tokens: int = 0
    longest: int = 0
    unusable: Counter[str] = field(default_factory=Counter)


def read_prompts(folder: Path, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> Prompts:
    """The prompts of a dataset artifact; says in the log what is left out.

    Raises:
        StageError: no row can be used; the reasons with their number.
    """
    found = Prompts(Dataset.from_list([]))
    rows = []
    for row in iter_rows(folder):
        prompt = prompt_of(row, bool(getattr(tokenizer, "chat_template", None)))
        if prompt is None:
            found.unusable["no question in `messages` or `prompt`"] += 1
            continue
        length = prompt_tokens(prompt, tokenizer)
        if not 0 < length <= max_prompt_length:
            found.unusable[f"longer than max_prompt_length={max_prompt_length}" if length else "no tokens"] += 1
            continue
        rows.append({PROMPT: prompt, ROW: json.dumps(row, ensure_ascii=False)})
        found.tokens += length
        found.longest = max(found.longest, length)
    if not rows:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in found.unusable.most_common(3))
        fix = "a larger max_prompt_length" if any("longer" in reason for reason in found.unusable) else ""
        raise StageError(
            f"no prompts: {reasons or 'the dataset has no rows'}",
            where=str(folder),
            fix=fix or 'give rows with tasks, e.g. data=reasoning_gym, or {"messages": [...], "answer": ...}',
        )
    for reason, count in found.unusable.most_common():
        log.warning("%d rows of %s left out: %s", count, folder, reason)
    found.rows = Dataset.from_list(rows)
    return found


def prompt_of(row: dict[str, Any], chat: bool) -> list[dict[str, str]] | str | None:
    """The question of a row: turns before the last answer, or text where the tokenizer knows no turns."""
    asked = row.get("messages") or row.get("prompt")
    if isinstance(asked, str):
        return ([{"role": "user", "content": asked}] if chat else asked) if asked.strip() else None
    turns = normal_messages(asked)
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        return None
    return turns if chat else "\n".join(turn["content"] for turn in turns) + "\n"


def prompt_tokens(prompt: list[dict[str, str]] | str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt as TRL will tokenise it."""
    if isinstance(prompt, str):
        return len(tokenizer(text=prompt)["input_ids"])
    return len(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    )
