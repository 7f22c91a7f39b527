"""From the rows of a dataset artifact to the prompts of a policy-gradient run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from posttrain.data.chat import TEMPLATE_DATE, continued_text
from posttrain.data.problems import prompt_of
from posttrain.data.reading import iter_rows
from posttrain.errors import StageError
from posttrain.rewards.config import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROMPT, ROW = "prompt", "row"
"""Columns of the trainer's rows: the text that is continued, and the artifact's row as JSON, because tasks differ in
their fields and a table's columns may not."""


@dataclass
class Prompts:
    """What a run may ask.

    Attributes:
        rows: `prompt` and `row` of every question.
        ids: tokens of each prompt, as evaluation and chat make them of it.
        unusable: reasons for leaving rows out.
    """

    rows: Dataset
    ids: dict[str, list[int]] = field(default_factory=dict)
    unusable: Counter[str] = field(default_factory=Counter)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids.values()))


def read_prompts(
    folder: Path, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, rewards: Mapping[str, Reward]
) -> Prompts:
    """The prompts of a dataset artifact whose answers the rewards can judge; says in the log what is left out.

    Raises:
        StageError: no row can be used; the reasons with their number.
    """
    rows: list[dict[str, str]] = []
    found = Prompts(Dataset.from_list([]))
    for row in iter_rows(folder):
        if lacking := _lacking(row, rewards):
            found.unusable[lacking] += 1
            continue
        text, special = continued_text(prompt_of(row, str(folder)), tokenizer, date_string=TEMPLATE_DATE)
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if not 0 < len(ids) <= max_prompt_length:
            found.unusable[f"longer than max_prompt_length={max_prompt_length}" if ids else "no tokens"] += 1
            continue
        rows.append({PROMPT: text, ROW: json.dumps(row, ensure_ascii=False)})
        found.ids[text] = ids
    if not rows:
        raise _nothing(folder, found)
    for reason, count in found.unusable.most_common():
        log.warning("%d rows of %s left out: %s", count, folder, reason)
    found.rows = Dataset.from_list(rows)
    return found


def _lacking(row: Mapping[str, Any], rewards: Mapping[str, Reward]) -> str:
    """Why no reward can judge an answer to a row; empty if one can."""
    deciding = {name: reward for name, reward in rewards.items() if reward.correctness} or rewards
    for reward in deciding.values():
        if not reward.needs or any(row.get(name) is not None for name in reward.needs):
            return ""
    needed = sorted({name for reward in deciding.values() for name in reward.needs})
    return f"no {' or '.join(needed)}, which the rewards need"


def _nothing(folder: Path, found: Prompts) -> StageError:
    reasons = "; ".join(f"{count} rows: {reason}" for reason, count in found.unusable.most_common(3))
    fix = 'give rows with tasks (data=reasoning_gym_rl), or {"messages": [...], "answer": ...} with a math reward'
    if any("longer" in reason for reason in found.unusable):
        fix = "a larger max_prompt_length"
    return StageError(f"no prompts: {reasons or 'the dataset has no rows'}", where=str(folder), fix=fix)
