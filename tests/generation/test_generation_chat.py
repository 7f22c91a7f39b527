"""A conversation: streaming, memory, stops, and the program around it."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_models import make_source
from transformers import GenerationConfig

from posttrain.errors import StageError
from posttrain.generation import Sampling, chat
from posttrain.generation.answers import Conversation, Words
from posttrain.generation.tokens import stop_tokens
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
    text = tokenizer.decode(conversation._tokens(conversation.turns))
    assert text.index("Hello") < text.index("More")
    conversation.reset()
    assert conversation.ask("Hello", GREEDY) == first


def test_without_a_template_the_text_is_continued() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    conversation = Conversation(make_source(), tokenizer)
    answer = conversation.ask("Once upon", GREEDY)
    conversation.turns.append({"role": "user", "content": "a time"})
    assert tokenizer.decode(conversation._tokens(conversation.turns)) == f"Once upon\n{answer}\na time"


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
    tokenizer, read = tiny_tokenizer(), []
    conversation = Conversation(make_source(), tokenizer, max_tokens=120)
    generate = conversation.engine.generate
    conversation.engine.generate = lambda rows, *rest, **more: (read.extend(rows), generate(rows, *rest, **more))[1]
    said = []
    for text in ("one", "two", "three", "four"):
        said += [{"role": "user", "content": text}]
        answer = conversation.ask(text, GREEDY)
        said += [{"role": "assistant", "content": answer}]
        assert len(read[-1]) + GREEDY.max_new_tokens <= 120
        # What was read are the newest turns, whole, and as many as fit.
        fitting = [first for first in range(0, len(said), 2) if len(tokens(tokenizer, said[first:-1])) + 8 <= 120]
        assert read[-1] == tokens(tokenizer, said[fitting[0] : -1])
        assert conversation.turns == said[fitting[0] :] and conversation.forgotten == fitting[0] // 2
    assert conversation.forgotten


def tokens(tokenizer, turns: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_turn_that_is_too_long_costs_nothing_but_itself() -> None:
    conversation = Conversation(make_source(), tiny_tokenizer(), max_tokens=120)
    for text in ("one", "two", "three", "four"):
        conversation.ask(text, GREEDY)
    before = list(conversation.turns), conversation.forgotten
    with pytest.raises(StageError, match="this turn has") as raised:
        conversation.ask("x" * 130, GREEDY)
    assert "max-new-tokens" not in str(raised.value), "fewer new tokens would not help"
    assert (conversation.turns, conversation.forgotten) == before


def test_fewer_new_tokens_are_advised_where_they_help() -> None:
    conversation = Conversation(make_source(), tiny_tokenizer(), max_tokens=60)
    with pytest.raises(StageError, match="--max-new-tokens 3") as raised:
        conversation.ask("x" * (60 - 3 - overhead()), GREEDY)
    assert "shorten it" in str(raised.value)
    conversation.ask("x" * (60 - 3 - overhead()), Sampling(max_new_tokens=3))


def overhead() -> int:
    """Tokens that the template adds to a turn."""
    return len(tokens(tiny_tokenizer(), [{"role": "user", "content": ""}]))


def test_a_model_of_one_position_is_one_sentence() -> None:
    with pytest.raises(StageError, match="no room for a prompt and an answer"):
        Conversation(make_source(max_position_embeddings=1), tiny_tokenizer())


def test_a_turn_that_failed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    conversation = Conversation(make_source(), tokenizer)
    conversation.ask("Hello", GREEDY)
    before = list(conversation.turns)
    raising = "{{ raise_exception('only one question') if messages | length > 1 else '' }}"
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", raising + tokenizer.chat_template)
        with pytest.raises(StageError, match="chat template refuses this conversation: only one question"):
            conversation.ask("More", GREEDY)
    assert conversation.turns == before
    with monkeypatch.context() as patch:
        patch.setattr(conversation.engine, "generate", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            conversation.ask("More", GREEDY)
    assert conversation.turns == before
    conversation.ask("More", GREEDY)
    assert len(conversation.turns) == 4


def test_a_tokenizer_of_another_model_is_told() -> None:
    for changes in ({}, {"hidden_act": "gelu"}):
        conversation = Conversation(make_source(vocab_size=258, pad_token_id=0, **changes), tiny_tokenizer())
        with pytest.raises(StageError, match="token 259, which is not in the vocabulary of 258: tokenizer and model"):
            conversation.ask("Hello", GREEDY)
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


def test_the_fallback_puts_the_models_own_settings_aside() -> None:
    plain, penalised = (Conversation(make_source(hidden_act="gelu"), tiny_tokenizer()) for _ in range(2))
    own = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=5.0, eos_token_id=257)
    penalised.model.generation_config = own
    for sampling in (GREEDY, Sampling(max_new_tokens=8, temperature=1.0, top_p=0.9, min_p=0.01)):
        assert plain.ask("Hello", sampling) == penalised.ask("Hello", sampling)
    assert penalised.model.generation_config is own


def test_answers_end_at_every_end_of_sequence_token() -> None:
    model, tokenizer = make_source(), tiny_tokenizer()
    model.generation_config.eos_token_id = [5, 257]
    assert stop_tokens(model, tokenizer) == (5, 257)
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == (257,)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_no_commands_from_a_model(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes into a file or another program is left as it is."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    chat._write("a\x1b[2J\x9b2J\n\tb")
    assert capsys.readouterr().out == ("a␛[2J\ufffd2J\n\tb" if terminal else "a\x1b[2J\x9b2J\n\tb")


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


def test_bytes_that_are_no_text_are_answered(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert chat.main([str(folder), *OPTIONS]) == 0
    expected = Conversation(make_source(), tiny_tokenizer()).ask("caf\ufffd", GREEDY)
    assert capsys.readouterr().out.strip() == expected
    assert chat.main([str(folder), "--prompt", "caf\udce9", *OPTIONS]) == 0
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize("options", [["--prompt", "Hello"], []], ids=["prompt", "lines"])
def test_a_reader_that_goes_away_ends_it_quietly(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert chat.main([str(folder), *options, *OPTIONS]) == 0
    assert "Error" not in capsys.readouterr().err


INTERRUPTED = """
import sys
from posttrain.generation import chat

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
sys.exit(chat.main(["folder", *{options!r}]))
"""


def test_an_interrupt_during_the_imports_is_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(options=OPTIONS)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 130, done.stderr
    assert not done.stderr.strip()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--temperature", "1e-9", "0 = greedy"),
        ("--temperature", "1e9", "10000"),
        ("--temperature", "nan", "finite"),
        ("--top-p", "nan", "less than or equal to 1"),
    ],
)
def test_settings_out_of_range_are_one_sentence(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat.main(["no folder", *OPTIONS, option, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"posttrain: {option} ") and said in error
