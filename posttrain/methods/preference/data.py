"""From the rows of a dataset artifact to tokenised pairs."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from posttrain.data.pairs import UNFINISHED, UnusableAnswers, answers_kind, normal_answers
from posttrain.data.reading import iter_rows
from posttrain.data.spans import IGNORE, UnusableRow, check_tokenizer, encode, spans
from posttrain.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


@dataclass
class Pairs:
    """Tokenised preference pairs.

    Attributes:
        rows: `prompt_ids`, `chosen_ids`, `rejected_ids` of every pair; prompt and answer have `sequence_length` tokens
            at most.
        truncated: pairs with an answer that lost its end; `unusable`: reasons for leaving rows out.
    """

    rows: Dataset
    truncated: int = 0
    unusable: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """Tokens of both sequences of all pairs."""
        return sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in self.rows)


def read_pairs(
    folder: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int, most: int | None = None
) -> Pairs:
    """Tokenise the pairs of a dataset artifact, the first `most`; say in the log what was cut or left out.

    Raises:
        StageError: no row can be used, or the tokenizer lacks what is needed; the reasons with their number.
    """
    check_tokenizer(tokenizer)
    found = Pairs(Dataset.from_list([]))
    rows: list[dict[str, list[int]]] = []
    for row in iter_rows(folder):
        if most is not None and len(rows) >= most:
            break
        try:
            pair, cut = encode_pair(row, tokenizer, sequence_length)
        except (UnusableRow, UnusableAnswers) as reason:
            found.unusable[str(reason)] += 1
            continue
        rows.append(pair)
        found.truncated += cut
    if not rows:
        raise _nothing(folder, found)
    for reason, count in found.unusable.most_common():
        log.warning("%d rows of %s left out: %s", count, folder, reason)
    if found.truncated:
        log.warning(
            "%d of %d pairs are longer than sequence_length=%d and lose their end",
            found.truncated,
            len(rows),
            sequence_length,
        )
    found.rows = Dataset.from_list(rows)
    return found


def encode_pair(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[dict[str, list[int]], bool]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a row, and whether an answer lost its end.

    The prompt ends where an answer begins in the model's own chat template, or before the first token that differs.
    An answer ends with EOS, unless the row says that it was cut off when it was written.

    Raises:
        UnusableRow, UnusableAnswers: it is no pair, or one that nothing can be learnt from.
    """
    if answers_kind(row) != "preference":
        kind = "a conversation" if row.get("messages") else "a text"
        raise UnusableRow(f"{kind} without `chosen` and `rejected` is no preference pair")
    answers = normal_answers(row)
    if answers["chosen"] == answers["rejected"]:
        raise UnusableRow("chosen and rejected are the same")
    encoded = {side: _encode(answers, side, side in row.get(UNFINISHED, ()), tokenizer) for side in SIDES}
    (chosen, begins), (rejected, begins_too) = encoded["chosen"], encoded["rejected"]
    shared = next((at for at, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
    start = min(begins, begins_too, len(chosen) if shared is None else shared)
    kept = {side: ids[start:sequence_length] for side, (ids, _) in encoded.items()}
    if not all(kept.values()):
        raise UnusableRow("nothing of an answer is left within sequence_length")
    if kept["chosen"] == kept["rejected"]:
        raise UnusableRow("chosen and rejected are the same within sequence_length")
    pair = {"prompt_ids": chosen[:start], "chosen_ids": kept["chosen"], "rejected_ids": kept["rejected"]}
    return pair, max(len(chosen), len(rejected)) > sequence_length


def _encode(
    answers: dict[str, Any], side: str, unfinished: bool, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], int]:
    """Token ids of the prompt with one answer, and where the answer begins."""
    row = {"prompt": answers["prompt"], "completion": answers[side]}
    ids, labels = encode(spans(row, "completion", tokenizer), tokenizer)
    if unfinished:
        ids = ids[:-1]
    begins = next((at for at, label in enumerate(labels) if label != IGNORE), len(ids))
    return ids, min(begins, len(ids))


def _nothing(folder: Path, found: Pairs) -> StageError:
    reasons = "; ".join(f"{count} rows: {reason}" for reason, count in found.unusable.most_common(3))
    fix = "give rows {prompt, chosen, rejected}, e.g. data=reasoning_gym_pairs or data.path=pairs.jsonl"
    if any("chat template" in reason for reason in found.unusable):
        fix = "add a chat_template to the model's tokenizer, or give prompt, chosen and rejected as strings"
    elif any("sequence_length" in reason for reason in found.unusable):
        fix = "a larger sequence_length, or shorter prompts"
    return StageError(f"no preference pairs: {reasons or 'the dataset has no rows'}", where=str(folder), fix=fix)
