"""A conversation: streaming, memory, stops, and the program around it."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from source_models import make_source

from posttrain.errors import StageError
from posttrain.generation import Sampling, chat
from posttrain.generation.answers import Conversation, Words, stop_tokens
from posttrain.models.tiny import tiny_tokenizer

GREEDY = Sampling(max_new_tokens=8)
OPTIONS = ["--max-new-tokens", "8", "--temperature", "0", "--top-p", "1", "--seed", "0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_source().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_the_conversation_is_what_the_model_reads() -> None:
    tokenizer, pieces = tiny_tokenizer(), []
    conversation = Conversation(make_source(), tokenizer)
    first = conversation.ask("Hello", GREEDY, pieces.append)
    assert "".join(pieces).strip() == first and len(pieces) > 1
    assert conversation.turns == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    conversation.ask("More", GREEDY)
    text = tokenizer.decode(conversation._tokens())
    assert text.index("Hello") < text.index("More")
    conversation.reset()
    assert conversation.ask("Hello", GREEDY) == first


def test_without_a_template_the_text_is_continued() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    conversation = Conversation(make_source(), tokenizer)
    answer = conversation.ask("Once upon", GREEDY)
    conversation.turns.append({"role": "user", "content": "a time"})
    assert tokenizer.decode(conversation._tokens()) == f"Once upon\n{answer}\na time"


def test_draws_differ_from_turn_to_turn_and_not_from_run_to_run() -> None:
    sampling = Sampling(max_new_tokens=8, temperature=1.5)

    def texts() -> list[str]:
        conversation, answers = Conversation(make_source(), tiny_tokenizer()), []
        for _ in range(2):
            conversation.reset()
            answers.append(conversation.ask("Hello", sampling))
        return answers

    first = texts()
    assert first == texts() and first[0] != first[1]


def test_old_turns_are_forgotten_when_the_cache_is_full() -> None:
    conversation = Conversation(make_source(), tiny_tokenizer(), max_tokens=120)
    for text in ("one", "two", "three", "four"):
        conversation.ask(text, GREEDY)
    assert conversation.forgotten and conversation.turns[0]["role"] == "user"
    assert len(conversation._tokens()) <= 120 + 20
    with pytest.raises(StageError, match="this turn has"):
        conversation.ask("x" * 130, GREEDY)
    assert conversation.turns == []


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    conversation = Conversation(make_source(), tiny_tokenizer())
    whole = Conversation(make_source(), tiny_tokenizer()).ask("Hello", GREEDY)
    answer = conversation.ask("Hello", GREEDY, interrupt)
    assert answer and whole.startswith(answer) and len(answer) < len(whole)
    assert conversation.turns[-1] == {"role": "assistant", "content": answer}
    conversation.reset()
    assert conversation.ask("Hello", GREEDY) == whole


def test_whole_characters_are_shown() -> None:
    tokenizer, pieces = tiny_tokenizer(), []
    words = Words(tokenizer, pieces.append)
    for token in tokenizer("für €")["input_ids"]:
        words.add(token)
    assert words.end() == "für €" and "".join(pieces) == "für €"
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_model_the_decoder_does_not_know_answers_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        conversation = Conversation(make_source(hidden_act="gelu"), tiny_tokenizer())
    assert "transformers' generate" in caplog.text and "gelu" in caplog.text
    pieces: list[str] = []
    answer = conversation.ask("Hello", GREEDY, pieces.append)
    assert answer and "".join(pieces).strip() == answer
    assert conversation.ask("Hello", Sampling(max_new_tokens=4, temperature=1.0, top_p=0.9)) is not None


def test_the_fallback_and_the_decoder_agree() -> None:
    by_engine, by_transformers = (Conversation(make_source(), tiny_tokenizer()) for _ in range(2))
    by_transformers.engine = None
    assert by_engine.ask("Hello", GREEDY) == by_transformers.ask("Hello", GREEDY)


def test_answers_end_at_every_end_of_sequence_token() -> None:
    model, tokenizer = make_source(), tiny_tokenizer()
    model.generation_config.eos_token_id = [5, 257]
    assert stop_tokens(model, tokenizer) == (5, 257)
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == (257,)


def test_one_prompt_is_answered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(folder), "--prompt", "Hello", *OPTIONS]) == 0
    expected = Conversation(make_source(), tiny_tokenizer()).ask("Hello", GREEDY)
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize("end", ["", "/exit\nnever read\n"])
def test_lines_are_answered_until_the_end(
    folder: Path, end: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hello\n\n/reset\nHello\n{'x' * 600}\n{end}"))
    assert chat.main([str(folder), *OPTIONS]) == 0
    shown = capsys.readouterr()
    answer = Conversation(make_source(), tiny_tokenizer()).ask("Hello", GREEDY)
    assert shown.out.count(answer) == 2 and "never" not in shown.out
    assert "this turn has" in shown.err, "a turn too long is said and the conversation goes on"


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(tmp_path), "--prompt", "x", *OPTIONS]) == 2
    assert capsys.readouterr().err.startswith("posttrain: ")
