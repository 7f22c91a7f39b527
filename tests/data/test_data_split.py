"""The split: by document, stable, disjoint, never empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.builders import committed, tiny
from posttrain.data.builders.prompts import TASKS, TOPICS, built_in
from posttrain.data.documents import Document, limited, split_documents
from posttrain.errors import RecipeError


def documents(texts: list[str], groups: list[str] | None = None) -> list[Document]:
    return [Document(str(i), text, group=groups[i] if groups else "") for i, text in enumerate(texts)]


@given(
    st.lists(st.text(min_size=1), min_size=2, max_size=30).filter(lambda texts: len(set(texts)) > 1),
    st.floats(0.01, 0.99),
)
def test_disjoint_complete_and_never_empty(texts: list[str], fraction: float) -> None:
    train, heldout = split_documents(documents(texts), fraction)
    assert train and heldout
    assert not {document.text for document in train} & {document.text for document in heldout}
    assert sorted(document.id for document in train + heldout) == sorted(map(str, range(len(texts))))


def test_order_and_company_do_not_matter() -> None:
    texts = [f"document {i}" for i in range(200)]
    _, heldout = split_documents(documents(texts), 0.2)
    _, reversed_heldout = split_documents(documents(texts[::-1]), 0.2)
    _, half = split_documents(documents(texts[:100]), 0.2)
    held = {document.text for document in heldout}
    assert held == {document.text for document in reversed_heldout}
    assert {document.text for document in half} == held & set(texts[:100])
    assert 20 <= len(held) <= 60


def test_groups_stay_together() -> None:
    rows = documents([f"row {i}" for i in range(100)], [f"book {i // 10}" for i in range(100)])
    train, heldout = split_documents(rows, 0.3)
    assert not {row.group for row in train} & {row.group for row in heldout}
    assert len(heldout) % 10 == 0


@pytest.mark.parametrize(
    "texts, found", [([], "0 different documents"), (["a"], "1 different document "), (["a", "a"], "1 different")]
)
def test_too_few_says_how_many_and_how_many_are_needed(texts, found) -> None:
    with pytest.raises(RecipeError, match=f"{found}.*at least 2") as error:
        split_documents(documents(texts), 0.5, "data.path=x")
    assert error.value.problems[0].where == "data.path=x" and "heldout_path" in error.value.problems[0].fix


def test_limits() -> None:
    rows = documents(["aaaa", "bbbb", "cccc"])
    assert [row.text for row in limited(rows, 2, None)] == ["aaaa", "bbbb"]
    assert [row.text for row in limited(rows, None, 9)] == ["aaaa", "bbbb"]
    assert [row.text for row in limited(rows, None, 1)] == ["aaaa"]


def test_tiny_text_is_tiny_and_the_same_everywhere() -> None:
    rows = tiny.build()
    assert len(rows) == 48 and sum(len(row.text) for row in rows) < 40_000
    assert rows[1].text.startswith("After the rain Ada painted the old lantern near the mill.")
    assert any(row.messages for row in rows)


def test_committed_text_is_what_its_datasheet_says() -> None:
    import hashlib

    path = committed.committed_file()
    sheet = (path.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in sheet
    rows = committed.build()
    assert f"{len(rows)} documents" in sheet and len(rows) >= 20
    assert path.stat().st_size <= 1 << 20
    assert all(150 <= len(row.text.split()) <= 1500 for row in rows)
    assert sum(bool(row.messages) for row in rows) == 8
    own = {file.stem: file.read_text(encoding="utf-8").strip() for file in (path.parent / "own").glob("*.md")}
    assert {row.id: row.text for row in rows if row.id.startswith("own/")} == {f"own/{k}": v for k, v in own.items()}


def test_prompts_are_varied() -> None:
    pairs = built_in(len(TASKS) * len(TOPICS))
    assert len({prompt for _, prompt in pairs}) == len(pairs)
    assert len({topic for topic, _ in built_in(100)}) > 40
    assert built_in(len(pairs) + 1)[-1] == pairs[0]
