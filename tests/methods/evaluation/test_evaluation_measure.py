"""Logits in chunks, cache accounting and greedy answers on live models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from source_models import make_source
from transformers import GenerationConfig

from posttrain.methods.evaluation.measure import cache_bytes, live_cache_bytes, throughput
from posttrain.methods.evaluation.samples import greedy_answers, render_prompt
from posttrain.methods.evaluation.scoring import Logits
from posttrain.models.tiny import tiny_tokenizer

IDS = torch.arange(20) * 7 % 256


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_chunked_logits_are_the_models_logits(family: str) -> None:
    model = make_source(family)
    logits = Logits(model)
    window = logits.window(IDS)
    expected = model(IDS[None]).logits[0]
    assert logits.chunked
    torch.testing.assert_close(torch.cat([window(slice(0, 7)), window(slice(7, 20))]), expected)


def test_capped_logits_are_found_and_used_as_they_are() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=1.0,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config).eval()
    logits = Logits(model)
    assert not logits.chunked
    torch.testing.assert_close(logits.window(IDS)(slice(3, 9)), model(IDS[None]).logits[0, 3:9])


def test_a_tensor_under_two_names_counts_once_and_state_is_constant() -> None:
    class Model:
        config = SimpleNamespace(vocab_size=300)

        def get_input_embeddings(self):
            return SimpleNamespace(weight=torch.zeros(1))

        def __call__(self, input_ids, use_cache):
            length = input_ids.shape[1]
            keys = torch.zeros(1, 2, length, 8, dtype=torch.bfloat16)
            attention = SimpleNamespace(keys=keys, values=keys, is_initialized=True)
            recurrent = SimpleNamespace(states={0: torch.zeros(5, 3)}, window=[torch.zeros(4)])
            return SimpleNamespace(past_key_values=SimpleNamespace(layers=[attention, recurrent]))

    per_token, constant = cache_bytes(Model())
    assert (per_token, constant) == (2 * 8 * 2, 15 * 4 + 4 * 4)


def test_live_cache_bytes_counts_every_layer() -> None:
    cache = make_source()(IDS[None], use_cache=True).past_key_values
    assert live_cache_bytes(cache) == 2 * 2 * 2 * 16 * 20 * 4


def test_throughput_takes_turns_and_stops_between_measurements() -> None:
    calls = []
    models = {"a": make_source(seed=1), "b": make_source(seed=2)}
    settings = {"prefill_tokens": 6, "decode_tokens": 2, "batch_size": 2, "repeats": 2}
    figures = throughput(models, **settings, boundary=lambda: calls.append(None))
    assert list(figures) == ["a", "b"] and len(calls) == 2 * (1 + 2)
    for row in figures.values():
        assert row.pop("decoder") == "engine"
        assert all(value > 0 for value in row.values())


def test_two_models_are_measured_with_the_same_decoder(caplog, monkeypatch) -> None:
    monkeypatch.setattr("posttrain.methods.evaluation.measure._ByDecoder", None)
    models = {"model": make_source(), "baseline": make_source(hidden_act="gelu")}
    settings = {"prefill_tokens": 6, "decode_tokens": 2, "batch_size": 1, "repeats": 1}
    with caplog.at_level("INFO"):
        figures = throughput(models, **settings)
    assert [row["decoder"] for row in figures.values()] == ["transformers"] * 2
    (said,) = [record.message for record in caplog.records if "decoder:" in record.message]
    assert "model and baseline" in said and "baseline: hidden_act 'gelu'" in said


def test_samples_end_at_the_tokens_at_which_an_answer_in_the_chat_ends() -> None:
    model, tokenizer = make_source(), tiny_tokenizer()
    free = greedy_answers(model, tokenizer, ["Hello"], 6)
    # The second is an id of a larger vocabulary, which the decoder refuses.
    model.generation_config.eos_token_id = [5, 300]
    assert greedy_answers(model, tokenizer, ["Hello"], 6) == free
    prompt = tokenizer(render_prompt(tokenizer, "Hello")[0], add_special_tokens=False)["input_ids"]
    first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    shown = tokenizer.decode(first).strip()
    assert free != [shown] and greedy_answers(model, tokenizer, ["Hello"], 6) == [shown], "the tokenizer's EOS ends it"


def test_answers_are_greedy_and_do_not_depend_on_the_models_own_settings() -> None:
    model, tokenizer = make_source(), tiny_tokenizer()
    prompts = ["Hello", "A much longer prompt than the first"]
    plain = greedy_answers(model, tokenizer, prompts, 6)
    own = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=5.0, eos_token_id=257, pad_token_id=258)
    model.generation_config = own
    assert greedy_answers(model, tokenizer, prompts, 6) == plain
    assert model.generation_config is own


def test_an_answer_is_the_argmax_continuation_of_the_chat_prompt() -> None:
    model, tokenizer = make_source(seed=4), tiny_tokenizer()
    text, special = render_prompt(tokenizer, "Hello")
    assert text.endswith("<|im_start|>assistant\n") and "Hello" in text and not special
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for _ in range(5):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == 257:
            break
        ids.append(token)
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert greedy_answers(model, tokenizer, ["Hello", "Another prompt, longer"], 5)[0] == expected


def test_a_model_the_decoder_does_not_know_is_answered_and_measured_by_transformers(caplog) -> None:
    model, tokenizer = make_source(hidden_act="gelu"), tiny_tokenizer()
    with caplog.at_level("WARNING"):
        answers = greedy_answers(model, tokenizer, ["Hello", "Another prompt, longer"], 5)
    assert caplog.text.count("transformers' generate") == 1 and "gelu" in caplog.text
    ids = tokenizer(render_prompt(tokenizer, "Hello")[0], add_special_tokens=False)["input_ids"]
    output = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert answers[0] == tokenizer.decode(output, skip_special_tokens=True).strip()
    settings = {"prefill_tokens": 6, "decode_tokens": 2, "batch_size": 2, "repeats": 1}
    figures = throughput({"a": model}, **settings)["a"]
    assert figures.pop("decoder") == "transformers" and all(value > 0 for value in figures.values())


def test_the_decoder_and_transformers_give_the_same_answers(monkeypatch) -> None:
    model, tokenizer = make_source(seed=2), tiny_tokenizer()
    prompts = ["Hello", "A much longer prompt than the first", "?"]
    by_decoder = greedy_answers(model, tokenizer, prompts, 12)
    monkeypatch.setattr("posttrain.methods.evaluation.samples.unsupported", lambda model: "tests")
    assert greedy_answers(model, tokenizer, prompts, 12) == by_decoder


def test_without_a_template_the_prompt_is_continued_as_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert render_prompt(tokenizer, "Once upon") == ("Once upon", True)
