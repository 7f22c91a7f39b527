"""Final answers in completions."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rewards.config import AnswerFormat
from posttrain.rewards.extraction import find_answer, last_boxed, last_tag


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("<answer>4</answer>", "4"),
        ("<answer> 4\n</answer> then", "4"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<answer>4</answer> and <answer>5", "4"),
        ("<answer>4</answer> stray </answer>", "4"),
        ("<answer>x <answer>5</answer>", "5"),
        ("</answer>4<answer>", None),
        ("<answer></answer>", None),
        ("<ANSWER>4</ANSWER>", None),
        ("4", None),
        ("", None),
    ],
)
def test_tags(text, wanted) -> None:
    assert find_answer(text, AnswerFormat()) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        (r"\boxed{4}", "4"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{1} or \boxed{2", "1"),
        (r"\boxed{2 \boxed{3}}", r"2 \boxed{3}"),
        (r"\boxed{1} {\boxed{2 \boxed{3}}", r"2 \boxed{3}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"} \boxed{1} }", "1"),
        (r"\\boxed{1}", None),
        (r"\boxed{}", None),
        ("boxed{1}", None),
    ],
)
def test_boxes(text, wanted) -> None:
    assert find_answer(text, AnswerFormat(find="boxed")) == wanted


def test_lines_wholes_and_patterns() -> None:
    assert find_answer("a\n b \n\n", AnswerFormat(find="last_line")) == "b"
    assert find_answer(" \n ", AnswerFormat(find="last_line")) is None
    assert find_answer(" a\nb ", AnswerFormat(find="whole")) == "a\nb"
    assert find_answer(" ", AnswerFormat(find="whole")) is None
    hashes = AnswerFormat(find="regex", pattern=r"#### (.*)|none")
    assert find_answer("#### 3\n#### 4", hashes) == "4"
    assert find_answer("nothing", hashes) is None and find_answer("#### 3 none", hashes) == "3 none"
    assert find_answer("#### 3\nnone", hashes) is None
    assert last_tag("<a>1</a>", "answer") is None and last_tag("<out>1</out>", "out") == "1"


@pytest.mark.parametrize(
    "part", ["\\boxed{", "<answer>", "</answer>", "{", "}", "\\", "\\boxed", "\\boxed ", "<answer></answer>", "\n"]
)
def test_hostile_lengths_take_linear_time(part) -> None:
    text = part * 100_000
    began = time.monotonic()
    for find in ("tag", "boxed", "last_line", "whole"):
        find_answer(text, AnswerFormat(find=find))
    assert time.monotonic() - began < 2


PARTS = ["\\", "boxed", "\\boxed{", "{", "}", "<answer>", "</answer>", "1", " ", "\0"]


@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join))
def test_whatever_is_found_stands_in_the_text(text) -> None:
    for find in ("tag", "boxed", "last_line", "whole"):
        found = find_answer(text, AnswerFormat(find=find))
        assert found is None or (found in text and found == found.strip())
    if (boxed := last_boxed(text)) is not None:
        assert boxed in text.rpartition("}")[0].partition("\\boxed")[2]
