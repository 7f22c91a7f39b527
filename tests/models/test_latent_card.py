"""Verifications 5 and 6 of the method card, and packed documents, on latent models of every family."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from upcycled_models import PAD, left_padded, make_latent, token_ids

from posttrain.generation.decoder import Decoder
from posttrain.generation.weights import DecoderWeights
from posttrain.models.architecture import cache_bytes_per_token, cache_elements_per_token, normalise
from posttrain.models.upcycled.latent_upcycled import LatentAttention

FAMILIES = ("llama", "qwen2", "qwen3")
RANKS = {"uniform": 24, "by layer": [40, 6]}
each_model = [
    pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS.keys()),
    pytest.mark.parametrize("family", FAMILIES),
]


def each(test):
    for mark in each_model:
        test = mark(test)
    return test


def _model(family: str, ranks, implementation: str = "sdpa"):
    model = make_latent(family, kv_lora_rank=ranks)
    model.set_attn_implementation(implementation)
    return model


@each
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_card_verification_5_cached_and_absorbed_equal_one_forward(
    family: str, ranks, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(family, ranks, implementation)
    ids, mask, _ = left_padded([6, 17, 20])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
    for absorbs in (True, False):
        monkeypatch.setattr(
            LatentAttention, "_absorbs", lambda self, queries, tokens, *_, absorbs=absorbs: absorbs and queries < tokens
        )
        cache, parts, start = DynamicCache(config=model.config), [], 0
        for length in (7, 5, 6, 1, 1):  # a chunked prefill, then steps
            end = start + length
            with torch.no_grad():
                parts.append(
                    model(
                        ids[:, start:end],
                        attention_mask=mask[:, :end],
                        position_ids=positions[:, start:end],
                        past_key_values=cache,
                    ).logits
                )
            start = end
        real = mask.bool()
        assert torch.allclose(torch.cat(parts, dim=1)[real], whole[real], atol=1e-5), absorbs


@each
def test_card_verification_5_chunked_prefill_of_generate(family: str, ranks) -> None:
    model = _model(family, ranks)
    ids, mask, _ = left_padded([6, 17, 20])
    lengths, forward = [], model.forward

    def counted(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    whole = model.generate(ids, **settings)
    model.forward = counted
    chunked = model.generate(ids, prefill_chunk_size=6, **settings)
    assert lengths[:4] == [6, 6, 6, 2], "the prompt was not read in chunks"
    assert torch.equal(whole.sequences, chunked.sequences)
    assert torch.allclose(torch.stack(whole.logits), torch.stack(chunked.logits), atol=1e-5)


@each
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (4, 1), (1, 100), (4, 100), (1, 5000), (4, 5000)])
def test_card_verification_6_cache_elements_and_bytes(family: str, ranks, rows: int, tokens: int) -> None:
    model = _model(family, ranks)
    arch = normalise(model.config.to_dict())
    by_layer = [
        (rank if isinstance(rank, int) else 24) + 8 for rank in (ranks if isinstance(ranks, list) else [24] * 2)
    ]
    assert cache_elements_per_token(arch) == by_layer
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for part in token_ids(rows, tokens).split(512, dim=1):
            model.model(part, past_key_values=cache)
    tensors = [[layer.keys, layer.values] for layer in cache.layers]
    assert [sum(tensor.numel() for tensor in pair) for pair in tensors] == [rows * tokens * each for each in by_layer]
    measured = sum(tensor.numel() * tensor.element_size() for pair in tensors for tensor in pair)
    predicted = rows * tokens * cache_bytes_per_token(arch, element_size=4)
    assert measured == predicted
    decoder = Decoder(DecoderWeights(model, tokens, torch.float32, share=True), rows, tokens)
    assert decoder.cache_bytes() == predicted


@pytest.mark.parametrize("peft", [False, True], ids=["plain", "PEFT"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_packed_documents_equal_documents_one_by_one(
    family: str, implementation: str, peft: bool, training: bool
) -> None:
    model = make_latent(family, mixers=["latent_attention", "full_attention"])
    model.set_attn_implementation(implementation)
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"], init_lora_weights=False))
    model.train(training)
    lengths = ([4, 6, 3], [1, 10, 2])
    documents = [[token_ids(1, length, seed=7 * length + row)[0] for length in of] for row, of in enumerate(lengths)]
    ids = torch.stack([torch.cat(row) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(length) for length in of]) for of in lengths])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits
        single = torch.stack(
            [torch.cat([model(input_ids=document[None]).logits[0] for document in row]) for row in documents]
        )
    # fp32 rounds to about 1e-5 here (it differs by processor); a document that leaks changes logits by 0.1 and more.
    assert torch.allclose(packed, single, atol=1e-4)
