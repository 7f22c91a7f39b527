"""A mixer with a state of its own fits beside attention by one entry in the table; the decoder is not touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from source_models import make_source
from torch import nn
from transformers import DynamicCache
from upcycled_models import MLA, fill_new_mixers, left_padded, token_ids

from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycled.modeling_upcycled import UpcycledForCausalLM
from posttrain.models.upcycled.registry_upcycled import MIXERS, MixerSpec
from posttrain.models.upcycling import build_upcycled

DECAY = 0.7


class Accumulator(nn.Module):
    """`h_t = DECAY · h_{t-1} + W x_t`: the smallest mixer with a recurrent state, [B, D, 1] in fp32."""

    def __init__(self, config: UpcycledConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, padding_mask, position_ids, past_key_values, **kwargs
    ):
        assert position_embeddings is None and attention_mask is None
        assert position_ids.shape[-1] == hidden_states.shape[1]
        drive = self.in_proj(hidden_states)
        if padding_mask is not None:
            assert padding_mask.shape == hidden_states.shape[:2]
            drive = drive * padding_mask[..., None]
        state = drive.new_zeros(drive.shape[0], drive.shape[2], 1, dtype=torch.float32)
        cached = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        if cached is not None and cached.recurrent_states[0] is not None:
            state = cached.recurrent_states[0].clone()
        outputs = []
        for step in drive.unbind(1):
            state = DECAY * state + step[..., None].float()
            outputs.append(state[..., 0])
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        return torch.stack(outputs, 1).to(hidden_states.dtype)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    MIXERS["accumulator"] = MixerSpec(lambda: Accumulator, ("padding",), "linear_attention", None)
    yield
    del MIXERS["accumulator"]


def hybrid(*mixers: str) -> UpcycledForCausalLM:
    source = make_source(num_hidden_layers=len(mixers))
    model = build_upcycled(source, UpcycledConfig.from_source(source.config, mixers=list(mixers), **MLA))
    fill_new_mixers(model)
    return model.eval()


ORDERS = [
    ("accumulator", "latent_attention", "full_attention"),
    ("full_attention", "accumulator", "latent_attention"),
    ("latent_attention", "accumulator"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_cached_steps_equal_one_forward(order: tuple[str, ...]) -> None:
    model, ids = hybrid(*order), token_ids(2, 12)
    assert model.config.layer_types[order.index("accumulator")] == "linear_attention"
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(ids).logits
        for part in ids.split([5, 4, 1, 1, 1], dim=1):
            parts.append(model(part, past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert cache.layers[order.index("accumulator")].recurrent_states[0].shape == (2, 64, 1)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_padding_does_not_enter_the_state(order: tuple[str, ...]) -> None:
    model = hybrid(*order)
    ids, mask, rows = left_padded([5, 9, 12])
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
        for index, row in enumerate(rows):
            assert torch.allclose(batch[index, -len(row) :], model(row[None]).logits[0], atol=1e-5)
        cache = DynamicCache(config=model.config)
        chunks = [model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache).logits]
        chunks.append(model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits)
    assert torch.allclose(torch.cat(chunks, 1)[mask.bool()], batch[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_generate(order: tuple[str, ...], beams: int) -> None:
    model = hybrid(*order)
    ids, mask, _ = left_padded([5, 9, 12])
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": beams, "pad_token_id": 258}
    with_cache, without = (
        model.generate(ids, attention_mask=mask, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_gradients_reach_the_state_mixer_through_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = hybrid(*ORDERS[0]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append(model.model.layers[0].self_attn.in_proj.weight.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_a_ready_causal_mask_is_refused_where_a_state_needs_padding() -> None:
    with pytest.raises(ValueError, match="2-D attention mask"):
        hybrid(*ORDERS[0])(token_ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_an_unknown_mixer_is_named() -> None:
    with pytest.raises(ValueError, match="unknown mixers mamba3; known: accumulator, full_attention"):
        UpcycledConfig(num_hidden_layers=1, mixers=["mamba3"])
