"""From a dataset artifact to token blocks."""

from __future__ import annotations

import pytest

from posttrain.data.chat import normal_messages, plain_text, render
from posttrain.data.documents import Document, write_dataset
from posttrain.data.reading import ROWS, encode_documents, read_card, read_rows, token_blocks
from posttrain.errors import StageError
from posttrain.models.tiny import tiny_tokenizer

EOS = 257
TURNS = (("user", "hi"), ("assistant", "yo"))


def test_rows_survive_writing(tmp_path) -> None:
    documents = [Document("a", "ü\u2028x"), Document("b", "User: hi\n\nAssistant: yo", messages=TURNS)]
    write_dataset(tmp_path, documents, name="n", split="train", licence="l", builder="files")
    rows = read_rows(tmp_path)
    assert [row["text"] for row in rows] == [document.text for document in documents]
    assert rows[1]["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    card = read_card(tmp_path)
    assert card["rows"] == 2 and card["bytes"] == sum(len(document.text.encode()) for document in documents)
    import hashlib

    assert card["sha256"] == hashlib.sha256((tmp_path / ROWS).read_bytes()).hexdigest()


def test_documents_end_with_one_eos() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"id": "a", "text": "ab"}, {"id": "b", "text": "c<|im_end|>"}]
    assert encode_documents(rows, tokenizer) == [[97, 98, EOS], [99, EOS]]
    assert encode_documents(rows, tokenizer, max_tokens=2) == [[97, 98], [99, EOS]]


def test_bos_only_if_the_tokenizer_adds_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    assert encode_documents([{"id": "a", "text": "ab"}], tokenizer) == [[256, 97, 98, EOS]]


def test_conversations_take_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": role, "content": content} for role, content in TURNS]
    row = {"id": "a", "text": plain_text(messages), "messages": messages}
    (ids,) = encode_documents([row], tokenizer)
    assert tokenizer.decode(ids) == render(messages, tokenizer)
    assert ids[-1] == EOS and ids[-2] == ord("o")
    tokenizer.chat_template = None
    (ids,) = encode_documents([row], tokenizer)
    assert tokenizer.decode(ids[:-1]) == "User: hi\n\nAssistant: yo"


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        encode_documents([{"id": "a", "text": "x"}], tokenizer)


def test_blocks_are_the_stream_without_its_tail() -> None:
    blocks = token_blocks([[1, 2, 3], [4, 5], [6, 7]], 3)
    assert blocks.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert token_blocks([[1, 2]], 3).shape == (0, 3)
    with pytest.raises(ValueError, match="sequence_length"):
        token_blocks([[1]], 0)


@pytest.mark.parametrize("line, says", [("{", "not JSON"), ('{"id": "a"}', "a row must be"), ("[1]", "a row must be")])
def test_broken_rows_are_named(tmp_path, line, says) -> None:
    (tmp_path / ROWS).write_text('{"id": "a", "text": "fine"}\n' + line + "\n")
    with pytest.raises(StageError, match=says) as error:
        read_rows(tmp_path)
    assert error.value.problems[0].where.endswith("rows.jsonl:2")


def test_missing_rows_are_named(tmp_path) -> None:
    with pytest.raises(StageError, match="no rows.jsonl"):
        read_rows(tmp_path)


def test_both_spellings_of_messages() -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert normal_messages(plain) == plain
    assert normal_messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == plain
    for bad in (None, [], "text", [{"role": "user"}], [{"role": "wizard", "content": "x"}], [1]):
        assert normal_messages(bad) is None
