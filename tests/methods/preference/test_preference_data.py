"""From rows to tokenised pairs: where an answer begins and ends, and what is left out."""

from __future__ import annotations

import pytest
from preference_world import pair, turn, write_rows

from posttrain.data.pairs import UnusableAnswers
from posttrain.data.spans import UnusableRow
from posttrain.errors import StageError
from posttrain.methods.preference.data import encode_pair, read_pairs
from posttrain.models.tiny import tiny_tokenizer

STRINGS = {"prompt": "two plus two is ", "chosen": "four", "rejected": "five, or so"}


def decoded(row: dict, length: int = 200) -> tuple[str, str, str]:
    tokenizer = tiny_tokenizer()
    ids, _ = encode_pair(row, tokenizer, length)
    return tuple(tokenizer.decode(ids[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_answers_are_what_follows_the_generation_prompt_with_eos():
    tokenizer, row = tiny_tokenizer(), pair(3)
    prompt, chosen, rejected = decoded(row)
    assert prompt == tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    assert (chosen, rejected) == ("It is 6.<|im_end|>", "Noooo.<|im_end|>")


def test_trl_tokenises_the_same_but_for_what_its_template_writes_after_eos():
    """TRL's own preparation of the row, as an independent tokenisation."""
    import trl
    from datasets import Dataset

    row, tokenizer = pair(3), tiny_tokenizer()
    theirs = trl.DPOTrainer._prepare_dataset(
        type("_", (), {"_tokenizer": tokenizer})(),
        Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")}]),
        tokenizer,
        trl.DPOConfig(max_length=200, use_cpu=True, report_to=[]),
        "train",
    )[0]
    ours, _ = encode_pair(row, tokenizer, 200)
    assert ours["prompt_ids"] == theirs["prompt_ids"]
    for name in ("chosen_ids", "rejected_ids"):
        assert tokenizer.decode(theirs[name]) == tokenizer.decode(ours[name]) + "\n"


def test_plain_strings_and_long_conversations():
    # The shared beginning of both answers belongs to them, not to the prompt.
    assert decoded(STRINGS) == ("two plus two is ", "four<|im_end|>", "five, or so<|im_end|>")
    row = pair(1)
    whole = {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
    assert decoded(whole) == decoded(row)
    assert decoded({"prompt": row["prompt"][0]["content"], **whole}) == decoded(row)


def test_an_answer_that_was_cut_off_is_not_learnt_to_end_there():
    assert decoded({**pair(3), "unfinished": ["rejected"]})[1:] == ("It is 6.<|im_end|>", "Noooo.")


@pytest.mark.parametrize(
    ("row", "length", "message"),
    [
        ({"text": "a"}, 99, "a text without `chosen` and `rejected`"),
        ({"messages": turn("user", "a"), "text": "a"}, 99, "a conversation without"),
        ({**STRINGS, "rejected": None}, 99, "no `rejected`"),
        (pair(1, "same", "same"), 99, "chosen and rejected are the same"),
        (pair(1, "same as this", "same as that"), 36, "the same within sequence_length"),
        (pair(1), 20, "nothing of an answer is left"),
        ({**STRINGS, "chosen": ""}, 99, "the completion is empty"),
        ({**STRINGS, "prompt": ""}, 99, "the prompt is empty"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, length, message):
    with pytest.raises((UnusableRow, UnusableAnswers), match=message):
        encode_pair(row, tiny_tokenizer(), length)


def test_what_is_cut_or_left_out_is_counted_and_told(tmp_path, caplog):
    rows = [pair(1), pair(2, "word " * 40), pair(3, "same", "same"), {"text": "x"}]
    found = read_pairs(write_rows(tmp_path / "data", rows), tiny_tokenizer(), 96)
    assert (len(found.rows), found.truncated, sum(found.unusable.values())) == (2, 1, 2)
    assert "1 of 2 pairs are longer than sequence_length=96" in caplog.text
    assert "chosen and rejected are the same" in caplog.text and "a text without" in caplog.text
    sequences = [row["prompt_ids"] + row[side] for row in found.rows for side in ("chosen_ids", "rejected_ids")]
    assert found.tokens == sum(map(len, sequences)) and max(map(len, sequences)) == 96


@pytest.mark.parametrize(
    ("rows", "length", "template", "message", "fix"),
    [
        ([], 96, True, "the dataset has no rows", "reasoning_gym_pairs"),
        ([{"text": "x"}] * 2, 96, True, "2 rows: a text without", "prompt, chosen, rejected"),
        ([pair(1)], 96, False, "no chat template", "add a chat_template"),
        ([pair(1)], 9, True, "nothing of an answer is left", "sequence_length"),
    ],
)
def test_nothing_to_train_on(tmp_path, rows, length, template, message, fix):
    tokenizer = tiny_tokenizer()
    if not template:
        tokenizer.chat_template = None
    with pytest.raises(StageError, match=message) as error:
        read_pairs(write_rows(tmp_path / "data", rows), tokenizer, length)
    assert fix in str(error.value) and str(tmp_path) in str(error.value)
