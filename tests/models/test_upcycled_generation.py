"""`generate` on upcycled models: the cache changes the cost, never the text."""

from __future__ import annotations

import pytest
import torch
from source_models import make_source
from upcycled_models import PAD, left_padded, make_latent, token_ids

from posttrain.models.upcycling import convert_full_attention

KINDS = {
    "latent": lambda: make_latent(),
    "mixed": lambda: make_latent(mixers=["full_attention", "latent_attention"]),
    "full": lambda: convert_full_attention(make_source()),
}
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_cache_equals_without(kind: str, implementation: str) -> None:
    model = KINDS[kind]()
    model.set_attn_implementation(implementation)
    ids, mask, _ = left_padded([5, 9, 12])
    with_cache, without = (
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **GREEDY) for use_cache in (True, False)
    )
    assert with_cache.shape == (3, 24)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_batch_equals_its_rows(kind: str) -> None:
    model = KINDS[kind]()
    ids, mask, rows = left_padded([5, 9, 12])
    batch = model.generate(ids, attention_mask=mask, **GREEDY)[:, 12:]
    for index, row in enumerate(rows):
        single = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **GREEDY)
        assert torch.equal(batch[index], single[0, len(row) :])


def test_full_attention_generates_as_the_source() -> None:
    source = make_source("qwen3")
    ids = token_ids()
    ours, theirs = (m.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY) for m in (KINDS["full"](), source))
    assert not torch.equal(ours, theirs), "another model gives another text"
    ours = convert_full_attention(source).generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_with_cache_equal_beams_without(kind: str) -> None:
    model, ids = KINDS[kind](), token_ids(2, 6)
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "attention_mask": torch.ones_like(ids)}
    with_cache, without = (model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(with_cache, without)
    assert len({tuple(row) for row in with_cache.tolist()}) > 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_gives_the_same_text(kind: str, implementation: str) -> None:
    model = KINDS[kind]()
    model.set_attn_implementation(implementation)
    ids, mask, _ = left_padded([5, 9, 12])
    dynamic = model.generate(ids, attention_mask=mask, **GREEDY)
    static = model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(dynamic, static)


def test_sampling_is_reproducible_and_not_greedy() -> None:
    model, ids = make_latent(), token_ids(2, 6)
    settings = {**GREEDY, "do_sample": True, "temperature": 2.0, "attention_mask": torch.ones_like(ids)}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, **settings))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
