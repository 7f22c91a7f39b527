"""Hybrids decode from their cache what one forward pass says, with padding, beams, adapters and after a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hybrid_models import ORDERS, VARIANTS, make_hybrid
from source_models import make_source
from test_model_loading import _logits, _logits_in_a_new_process
from upcycled_models import PAD, left_padded, token_ids

from posttrain.errors import PosttrainError
from posttrain.generation import DecodeEngine
from posttrain.generation.fallback import generate_by_transformers
from posttrain.generation.settings import Sampling
from posttrain.generation.support import unsupported
from posttrain.models.architecture import cache_bytes_per_token, cache_state_bytes, normalise
from posttrain.models.loading import load_model, save_model
from posttrain.models.tiny import tiny_tokenizer
from posttrain.models.upcycled.mamba_upcycled import FP32

LONG = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": PAD}
SHORT = {**LONG, "max_new_tokens": 12, "min_new_tokens": 12}
each_order = pytest.mark.parametrize("order", ORDERS)


@pytest.mark.parametrize("variant", ["4 heads share", "qk norm, biases, own taps"])
@each_order
def test_card_verification_4_64_steps_equal_one_forward(order: str, variant: str) -> None:
    model = make_hybrid(ORDERS[order], **VARIANTS[variant])
    ids, mask, _ = left_padded([5, 19, 26])
    found = model.generate(ids, attention_mask=mask, **LONG, output_logits=True, return_dict_in_generate=True)
    mask = torch.cat([mask, torch.ones(3, 64, dtype=mask.dtype)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(found.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.allclose(torch.stack(found.logits, 1), whole[:, 25:-1], atol=1e-4)


@pytest.mark.parametrize("beams", [2, 3])
@each_order
def test_card_verification_4_beams_with_cache_equal_beams_without(order: str, beams: int) -> None:
    model = make_hybrid(ORDERS[order])
    ids, mask, _ = left_padded([5, 9, 12])
    settings = {**SHORT, "num_beams": beams, "num_return_sequences": beams, "attention_mask": mask}
    with_cache, without = (model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(with_cache, without)
    assert len({tuple(row) for row in with_cache.tolist()}) > 3


@each_order
def test_chunked_prefill_and_a_static_cache_give_the_same_text(order: str) -> None:
    model = make_hybrid(ORDERS[order])
    ids, mask, rows = left_padded([5, 19, 26])
    whole = model.generate(ids, attention_mask=mask, **SHORT)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=7, **SHORT), whole)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **SHORT), whole)
    for index, row in enumerate(rows):
        single = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **SHORT)
        assert torch.equal(whole[index, 26:], single[0, len(row) :])


@each_order
def test_a_text_goes_on_from_its_cache(order: str) -> None:
    model, ids = make_hybrid(ORDERS[order]), token_ids(2, 9)
    once = model.generate(ids, attention_mask=torch.ones_like(ids), **SHORT)
    half = {**SHORT, "max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=torch.ones_like(ids), **half)
    whole = torch.ones_like(first.sequences)
    second = model.generate(first.sequences, attention_mask=whole, past_key_values=first.past_key_values, **half)
    assert torch.equal(second.sequences, once)


def test_a_cache_of_states_alone_counts_and_forgets() -> None:
    model, ids = make_hybrid(ORDERS["states alone"]), token_ids(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 11
    cache.reset()
    with torch.no_grad():
        assert cache.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@each_order
def test_the_decoder_and_transformers_answer_alike(order: str) -> None:
    """Left-padded batches over 64 steps, states, latents and keys side by side."""
    model = make_hybrid(ORDERS[order])
    assert unsupported(model) is None
    _, _, rows = left_padded([5, 9, 12, 9])
    rows, sampling = [row.tolist() for row in rows], Sampling(max_new_tokens=64, temperature=0)
    answers = DecodeEngine(model, 4, 80).generate(rows, sampling)
    assert answers.tokens == generate_by_transformers(model, rows, sampling)
    arch = normalise(model.config.to_dict())
    states = cache_state_bytes(arch, element_size=4)
    # A cache of 80 slots and 4 rows: what grows, and what does not.
    expected = 4 * (80 * cache_bytes_per_token(arch, 4) + states)
    assert DecodeEngine(model, 4, 80).decoder.cache_bytes() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_card_verification_11_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_hybrid(ORDERS["state first"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(FP32)}
    save_model(model, None, tmp_path, dtype=dtype)
    for again in (load_model(tmp_path, dtype="auto"), load_model(tmp_path, dtype=torch.bfloat16)):
        state = again.state_dict()
        assert all(state[name].dtype == torch.float32 for name in before)
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert load_model(tmp_path, dtype="auto").dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(_logits(load_model(tmp_path)), _logits(model))


def test_card_verification_11_a_new_process_with_the_carried_code_alone(tmp_path: Path) -> None:
    models = [
        make_hybrid(ORDERS["state first"], **VARIANTS[name]).to(dtype)
        for name in ("4 heads share", "qk norm, biases, own taps")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for index, model in enumerate(models):
        save_model(model, tiny_tokenizer(), tmp_path / f"m{index}")
    code = (
        "import sys\n"
        "sys.modules['posttrain'] = sys.modules['posttrain_kernels'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "models = []\n"
        f"for index in range({len(models)}):\n"
        "    model, told = AutoModelForCausalLM.from_pretrained(\n"
        "        f'{folder}/m{index}', trust_remote_code=True, dtype='auto', output_loading_info=True\n"
        "    )\n"
        "    assert not any(told[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told\n"
        "    assert model.model.layers[0].self_attn.A_log.dtype.itemsize == 4\n"
        "    models.append(model)\n"
    )
    logits = _logits_in_a_new_process(code, tmp_path, with_package=False)
    for model, theirs in zip(models, logits, strict=True):
        assert torch.equal(theirs, _logits(model))


def test_a_model_without_its_decays_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(make_hybrid(), None, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.self_attn.A_log"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PosttrainError, match="A_log"):
        load_model(tmp_path)


def test_adapters_train_and_merge() -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = make_hybrid(ORDERS["state first"]), token_ids(2, 20)
    with torch.no_grad():
        plain = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["in_proj", "out_proj"], init_lora_weights=False))
    loss = adapted.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert len(trained) == 8 and all("lora" in name for name in trained)
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        assert not torch.allclose(expected, plain, atol=0.1)
        assert torch.allclose(adapted.merge_and_unload()(ids).logits, expected, atol=1e-3)


def test_random_models_get_the_published_ranges() -> None:
    from transformers import AutoModelForCausalLM

    config = make_hybrid(("mamba2", "full_attention")).config
    model = AutoModelForCausalLM.from_config(config)
    mixer = model.model.layers[0].self_attn
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 <= steps.min() and steps.max() <= 0.1 and steps.unique().numel() == 8
    assert 0 <= mixer.A_log.min() and mixer.A_log.exp().max() <= 16 and mixer.A_log.unique().numel() == 8
    assert torch.equal(mixer.D, torch.ones(8))


def test_a_hybrid_source_keeps_its_states() -> None:
    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    first = make_hybrid(("mamba2", "full_attention"))
    second = build_upcycled(first, UpcycledConfig.from_source(first.config, mixers=["mamba2", "mamba2"]))
    assert torch.equal(second.model.layers[0].self_attn.A_log, first.model.layers[0].self_attn.A_log)
    assert all(parameter.isnan().all() for parameter in second.model.layers[1].self_attn.parameters())
    bf16 = build_upcycled(make_source().bfloat16(), UpcycledConfig.from_source(make_source().config, ["mamba2"] * 2))
    assert bf16.model.layers[0].self_attn.A_log.dtype == torch.float32
