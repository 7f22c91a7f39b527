"""Prompts that hide a needle: exact length, depth, borders, keys, text that is drawn."""

from __future__ import annotations

import pytest
from needle_case import prompts, text_of, without_template

from posttrain.errors import StageError
from posttrain.methods.evaluation.config import NeedleSettings
from posttrain.methods.evaluation.haystack import CITIES, KEYS, Haystack, contains_key, draw_needle
from posttrain.models.tiny import tiny_tokenizer


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("key", list(KEYS))
def test_prompts_have_exactly_their_length_and_hold_the_key_once(chat: bool, key: str) -> None:
    found = prompts(None if chat else without_template(), key=key, max_new_tokens=20)
    assert [(one.length, one.depth, one.sample) for one in found] == [
        (length, depth, sample) for length in (460, 700) for depth in (0.0, 0.5, 1.0) for sample in (0, 1)
    ]
    for one in found:
        assert len(one.ids) + 20 == one.length
        text, needle = text_of(one), one.needle
        assert text.count(needle.key) == 1 and f"\n{needle.sentence}\n" in text
        assert text.endswith(f"The special magic {key} of {needle.city} is")
        assert text.count(f"The special magic {key} of {needle.city} is") == 2
        assert text.startswith("<|im_start|>user\nA special" if chat else "A special")
        assert ("<|im_start|>assistant\nThe" in text) == chat
        assert needle.key in needle.candidates and len(set(needle.candidates)) == 4
        assert [tiny_tokenizer().decode(tokens) for tokens in one.keys] == [f" {key}" for key in needle.candidates]


def test_the_sentence_stands_at_its_depth_and_between_sentences() -> None:
    for one in prompts(lengths=[1000], depths=5):
        text = text_of(one)
        head, _, rest = text.partition("asked for it.\n\n")
        body = rest.rpartition("\n\nWhat is the special")[0]
        before, needle, after = body.partition(f"\n{one.needle.sentence}\n")
        assert needle and len(before) / len(before + after) == pytest.approx(one.at)
        assert abs(one.at - one.depth) < 0.1
        if one.depth == 0:
            assert before == ""
        elif one.depth == 1:
            assert after == ""
        else:
            assert before.rstrip().endswith((".", "!", "?")) and not after[:1].isalnum()


def test_documents_follow_each_other_from_a_drawn_one_on_and_none_comes_twice() -> None:
    stack = Haystack([{"text": "One two. Three"}, {"text": " "}, {"text": "Four\nfive"}], tiny_tokenizer())
    ids, borders = stack.cut(1, 20)
    assert tiny_tokenizer().decode(ids) == "Four\nfive\n\nOne two. "
    assert [tiny_tokenizer().decode(ids[place:]) for place in borders] == [
        "Four\nfive\n\nOne two. ", "\nfive\n\nOne two. ", "One two. ", " ", "",
    ]  # fmt: skip
    assert len(stack.cut(0, 25)[0]) == 25 == len("One two. Three\n\nFour\nfive")
    with pytest.raises(StageError, match="the data has 25 tokens of text; 26 are needed"):
        stack.cut(0, 26)


def test_a_border_inside_a_token_is_none() -> None:
    """The tokenizer joins what the border would part, as merges over a full stop do."""

    class Joined:
        is_fast, eos_token_id = True, 0

        def __call__(self, text, **_):
            return {"input_ids": [1, 2, 3], "offset_mapping": [(0, 2), (2, 6), (6, len(text))]}

    assert Haystack([{"text": "a b. cd. e"}], Joined()).cut(0, 3)[1] == [0, 3]


def test_keys_depend_on_seed_depth_and_sample_and_on_nothing_else() -> None:
    first, again, other = prompts(), prompts(), prompts(seed=1)
    assert first == again
    assert [one.needle for one in first] != [one.needle for one in other]
    short, long = first[:6], first[6:]
    assert [one.needle for one in short] == [one.needle for one in long]
    assert len({one.needle.key for one in short}) == 6
    assert [one.needle for one in prompts(lengths=[900])] == [one.needle for one in short]
    starts = {text_of(one).partition("asked for it.\n\n")[2][:12] for one in prompts(depths=1, samples=9)}
    assert len(starts) > 1


def test_the_right_key_stands_anywhere_among_the_candidates() -> None:
    cfg = NeedleSettings(candidates=4)
    drawn = [draw_needle(cfg, depth, sample)[0] for depth in range(10) for sample in range(40)]
    places = [one.candidates.index(one.key) for one in drawn]
    assert all(60 < places.count(place) < 140 for place in range(4))
    assert {one.city for one in drawn} == set(CITIES)
    assert all(len(one.key) == 7 and one.key.isdigit() for one in drawn)


@pytest.mark.parametrize(
    ("text", "found"),
    [("1234567", True), (" 1234567.", True), ("it is 1234567, yes", True), ("12345678", False), ("91234567", False)],
)
def test_an_answer_has_the_key_only_as_a_whole(text: str, found: bool) -> None:
    assert contains_key(text, "1234567") is found


def test_a_template_that_changes_the_text_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'][:20] }}"
    with pytest.raises(StageError, match="does not give a user's text as it is"):
        prompts(tokenizer)
