"""The tokenizer made in code, and random models."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models.inspect import check_model_folder, model_meta, tokenizer_digest
from posttrain.models.tiny import TINY_VOCABULARY, tiny_tokenizer, write_random_model

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
TOKENIZER = tiny_tokenizer()


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_ids_are_bytes_and_nothing_is_added() -> None:
    assert TOKENIZER("A b\né")["input_ids"] == list("A b\né".encode())
    assert len(TOKENIZER) == TINY_VOCABULARY == 300
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (256, 257, 258)


def test_turns_of_the_chat_template_end_with_eos() -> None:
    ids = TOKENIZER(TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False))["input_ids"]
    assert ids[-2:] == [TOKENIZER.eos_token_id, ord("\n")]
    prompt = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_random_model_is_complete_and_repeatable(tmp_path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture = {**SHAPE, "model_type": family}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_model(tmp_path / name, architecture, seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    check_model_folder(tmp_path / "a")
    meta = model_meta(tmp_path / "a")
    assert meta.architecture["model_type"] == family and meta.chat_template is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 257
    assert getattr(model.config, "sliding_window", None) is None
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded("x é")["input_ids"] == TOKENIZER("x é")["input_ids"]
    if family == "qwen2":
        return  # transformers puts its own Qwen2Tokenizer, with another pre-tokenizer, in place of any saved one
    loaded.save_pretrained(tmp_path / "again")
    assert tokenizer_digest(tmp_path / "again") == tokenizer_digest(tmp_path / "a")


def test_bfloat16_is_stored(tmp_path) -> None:
    write_random_model(tmp_path, {**SHAPE, "model_type": "llama"}, 0, "bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert model_meta(tmp_path).extra["weight_bytes"] < 2 * 40_000


def test_too_small_a_vocabulary_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="vocab_size >= 300"):
        write_random_model(tmp_path, {**SHAPE, "model_type": "llama", "vocab_size": 256}, 0)
