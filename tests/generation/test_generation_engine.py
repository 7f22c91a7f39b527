"""The engine against transformers: greedy tokens, log-probabilities, stops, waves, compaction, new weights."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from generation_models import HYBRID, MIXED, MODELS, full_logprobs, generate, make_upcycled, prompts
from source_models import make_source

from posttrain.errors import StageError
from posttrain.generation import DecodeEngine, Sampling
from posttrain.generation.decoder import _causal_mask

DRAWN = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    model, rows = MODELS[name](), prompts()
    answers = DecodeEngine(model, len(rows), 64).generate(rows, Sampling(max_new_tokens=20))
    assert answers.tokens == generate(model, rows, 20)
    assert answers.finished == [False] * len(rows) and answers.steps == 19


@pytest.mark.parametrize("name", ["llama", "mixed", "hybrid"])
@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_rows_stop_at_different_lengths(name: str, max_rows: int) -> None:
    model, rows = MODELS[name](), prompts((3, 8, 8, 2, 11, 6))
    free = generate(model, rows, 20)
    # Stop tokens that end some rows early, some late and some never.
    stop = (free[0][0], free[1][4], free[2][13])
    expected = generate(model, rows, 20, stop)
    assert len({len(answer) for answer in expected}) > 2, "the case is not ragged"
    answers = DecodeEngine(model, max_rows, 40).generate(rows, Sampling(max_new_tokens=20, stop=stop))
    assert answers.tokens == expected
    assert answers.finished == [answer[-1] in stop for answer in expected]
    assert [len(row) for row in answers.logprobs] == [len(row) for row in expected]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_log_probabilities_are_those_of_a_full_forward(name: str, temperature: float) -> None:
    model, rows = MODELS[name](), prompts()
    sampling = Sampling(max_new_tokens=10, temperature=temperature, top_p=0.9, seed=3)
    answers = DecodeEngine(model, len(rows), 64).generate(rows, sampling)
    for row, answer, logprobs in zip(rows, answers.tokens, answers.logprobs, strict=True):
        expected = full_logprobs(model, row, answer, temperature or 1.0)
        # States add up over tokens in another order than the scan does.
        atol = 2e-5 if "mamba2" in (getattr(model.config, "mixers", None) or ()) else 1e-5
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("filters", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize("mixers", [MIXED, HYBRID], ids=str)
def test_samples_do_not_depend_on_the_rows_beside_them(mixers: list[str], filters: dict) -> None:
    model, rows = make_upcycled(mixers=mixers), prompts((4, 9, 2, 7, 12, 5, 9))
    sampling = Sampling(**DRAWN, **filters)
    together = DecodeEngine(model, 7, 40).generate(rows, sampling)
    stop = (together.tokens[1][3], together.tokens[4][6], together.tokens[5][1])
    ragged = sampling.model_copy(update={"stop": stop})
    expected = [_cut(answer, stop) for answer in together.tokens]
    assert len({len(answer) for answer in expected}) > 2
    for max_rows in (1, 2, 3, 16):
        engine = DecodeEngine(model, max_rows, 40)
        assert engine.generate(rows, sampling).tokens == together.tokens, "waves"
        assert engine.generate(rows, ragged).tokens == expected, "compaction"
    engine = DecodeEngine(model, 4, 40)
    some = [5, 1, 3]
    alone = engine.generate([rows[index] for index in some], sampling, row_ids=some)
    assert alone.tokens == [together.tokens[index] for index in some], "composition"
    other = engine.generate([rows[index] for index in some], sampling, row_ids=[8, 9, 10])
    assert other.tokens != alone.tokens


def test_finished_rows_are_dropped() -> None:
    model, rows = make_source(), prompts((6,) * 8)
    engine, widths = DecodeEngine(model, 8, 40), []
    free = engine.generate(rows, Sampling(max_new_tokens=16))
    stop = tuple({answer[2] for answer in free.tokens[:6]})
    advance = engine._advance
    engine._advance = lambda rows, sampling: (widths.append(rows), advance(rows, sampling))[1]
    answers = engine.generate(rows, Sampling(max_new_tokens=16, stop=stop))
    assert widths == sorted(widths, reverse=True) and widths[0] == 8 and widths[-1] <= 4
    assert answers.tokens == [_cut(answer, stop) for answer in free.tokens]


def test_a_look_every_few_steps_changes_nothing() -> None:
    model, rows = make_source(), prompts((6, 3, 9))
    engine = DecodeEngine(model, 3, 40)
    free = engine.generate(rows, Sampling(max_new_tokens=14)).tokens
    stop = (free[0][2], free[1][5])
    sampling = Sampling(max_new_tokens=14, stop=stop)
    expected = engine.generate(rows, sampling).tokens
    engine.look_every = 4
    assert engine.generate(rows, sampling).tokens == expected


def test_slots_outside_a_rows_own_may_hold_anything() -> None:
    model, rows = make_upcycled(mixers=MIXED), prompts()
    engine = DecodeEngine(model, 8, 40)
    expected = engine.generate(rows, Sampling(**DRAWN))
    for cache in engine.decoder.caches:
        for tensor in cache.tensors:
            tensor.fill_(torch.nan)
    assert engine.generate(rows, Sampling(**DRAWN)).logprobs == expected.logprobs


def test_a_rehearsed_step_leaves_no_trace() -> None:
    """A capture takes steps for trial: a state that kept them would be some tokens ahead."""
    model = make_upcycled(mixers=HYBRID)
    decoder = DecodeEngine(model, 2, 16).decoder
    ids, start = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([0, 0])
    with torch.no_grad():
        decoder.prefill(ids, start, 0, 3, padded=False)
        saved = decoder.snapshot()
        first = decoder.step(torch.tensor([1, 2]), torch.tensor([3]), start)
        assert not torch.equal(decoder.step(torch.tensor([1, 2]), torch.tensor([3]), start), first)
        decoder.restore(saved)
        assert torch.equal(decoder.step(torch.tensor([1, 2]), torch.tensor([3]), start), first)


def test_a_padding_token_sees_itself_alone() -> None:
    mask = _causal_mask(torch.arange(4, 8), torch.tensor([4, 6]))
    assert mask.shape == (2, 1, 4, 4)
    assert torch.equal(mask[0, 0], torch.ones(4, 4).tril().bool())
    assert mask[1, 0].long().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("prefill_tokens", [1, 10, 30])
@pytest.mark.parametrize("mixers", [MIXED, HYBRID], ids=str)
def test_prompts_read_in_slices_give_the_same(mixers: list[str], prefill_tokens: int) -> None:
    model, rows = make_upcycled(mixers=mixers), prompts((5, 9, 12, 1, 12, 7))
    engine = DecodeEngine(model, 6, 40)
    expected = engine.generate(rows, Sampling(max_new_tokens=8)).tokens
    engine.prefill_tokens = prefill_tokens
    assert engine.generate(rows, Sampling(max_new_tokens=8)).tokens == expected


@pytest.mark.parametrize("name", ["qwen2", "untied", "mixed"])
def test_new_weights_are_taken_over_in_place(name: str) -> None:
    model, rows, sampling = MODELS[name](), prompts(), Sampling(max_new_tokens=8)
    engine = DecodeEngine(model, 5, 40)
    first = engine.generate(rows, sampling).tokens
    held = _storages(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert engine.generate(rows, sampling).tokens == first, "the engine's weights are a copy"
    engine.load(model)
    assert _storages(engine) == held
    assert engine.generate(rows, sampling).tokens == generate(model, rows, 8) != first


def test_weights_of_another_architecture_are_refused() -> None:
    engine = DecodeEngine(make_source(), 2, 20)
    for other in (make_source(num_hidden_layers=1), make_source("qwen3"), make_source(tie_word_embeddings=False)):
        with pytest.raises(StageError, match="another architecture"):
            engine.load(other)


def test_a_model_in_bf16_decodes_in_its_own_type() -> None:
    model, rows = make_source().to(torch.bfloat16), prompts()
    engine = DecodeEngine(model, 5, 40, dtype=torch.bfloat16)
    assert {tensor.dtype for cache in engine.decoder.caches for tensor in cache.tensors} == {torch.bfloat16}
    answers = engine.generate(rows, Sampling(max_new_tokens=6))
    for row, answer, logprobs in zip(rows, answers.tokens, answers.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), full_logprobs(model, row, answer), atol=0.15, rtol=0.05)


def test_every_token_is_shown_as_it_comes() -> None:
    model, rows = make_source(), prompts()
    engine, seen = DecodeEngine(model, 2, 40), [[] for _ in rows]
    free = engine.generate(rows, Sampling(max_new_tokens=9)).tokens
    sampling = Sampling(max_new_tokens=9, stop=(free[0][3], free[2][1]))

    def show(new: dict[int, int]) -> None:
        for number, token in new.items():
            seen[number].append(token)

    answers = engine.generate(rows, sampling, on_step=show)
    assert seen == answers.tokens == engine.generate(rows, sampling).tokens


def test_the_caller_can_end_it() -> None:
    engine, calls = DecodeEngine(make_source(), 1, 40), []
    answers = engine.generate(
        prompts(), Sampling(max_new_tokens=9), on_step=lambda new: calls.append(new) or len(calls) == 3
    )
    assert len(calls) == 3 and sorted(map(len, answers.tokens)) == [0, 0, 0, 0, 3]


def test_no_prompts_give_no_answers() -> None:
    answers = DecodeEngine(make_source(), 2, 20).generate([], Sampling())
    assert (answers.tokens, answers.logprobs, answers.finished, answers.steps) == ([], [], [], 0)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 16], {"max_new_tokens": 5}, "exceeds the cache of 20"),
        ([[1]], {"max_new_tokens": 5, "stop": (300,)}, "not in the vocabulary of 300"),
        ([[1], [2, 300, 4]], {}, "prompt 1 holds token 300.*do not belong together"),
        ([[-1, 5]], {}, "prompt 0 holds token -1"),
    ],
)
def test_what_cannot_be_decoded_is_refused(rows: list, settings: dict, message: str) -> None:
    with pytest.raises(StageError, match=message):
        DecodeEngine(make_source(), 2, 20).generate(rows, Sampling(**{"max_new_tokens": 4, **settings}))


def test_row_ids_are_one_for_each_prompt() -> None:
    with pytest.raises(StageError, match="1 row ids for 2 prompts"):
        DecodeEngine(make_source(), 2, 20).generate([[1], [2]], Sampling(max_new_tokens=2), row_ids=[0])


def test_inference_mode_around_it_does_no_harm() -> None:
    model, rows = make_source(), prompts()
    with torch.inference_mode():
        engine = DecodeEngine(model, 5, 40)
        inside = engine.generate(rows, Sampling(max_new_tokens=4)).tokens
    engine.load(model)
    assert engine.generate(rows, Sampling(max_new_tokens=4)).tokens == inside


def test_an_engine_goes_with_its_last_name() -> None:
    engine = DecodeEngine(make_source(), 2, 20)
    engine.generate([[1, 2], [3]], Sampling(max_new_tokens=4))
    gc.disable()
    try:
        gone = weakref.ref(engine), weakref.ref(engine.decoder.caches[0]), weakref.ref(engine.weights)
        del engine
        assert [reference() for reference in gone] == [None] * 3, "a cycle would keep its memory"
    finally:
        gc.enable()


def _storages(engine: DecodeEngine) -> list[int]:
    weights = engine.weights
    tensors = [weights.embeddings, weights.head, weights.norm, *(table for pair in weights.rotary for table in pair)]
    tensors += [tensor for layer in weights.layers for tensor in layer.values()]
    tensors += [tensor for cache in engine.decoder.caches for tensor in cache.tensors]
    return [tensor.data_ptr() for tensor in tensors]


def _cut(answer: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(answer) if token in stop]
    return answer[: ends[0] + 1] if ends else answer


@pytest.mark.parametrize("name", ["llama", "mixed"])
def test_a_prompt_that_comes_again_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, few = MODELS[name](), prompts((4, 9, 2))
    rows = [few[which] for which in (1, 0, 1, 2, 1, 0)]
    engine, read = DecodeEngine(model, 6, 40), []
    prefill = engine.decoder.prefill

    def counted(ids: torch.Tensor, *others: object) -> torch.Tensor:
        read.append(len(ids))
        return prefill(ids, *others)

    monkeypatch.setattr(engine.decoder, "prefill", counted)
    together = engine.generate(rows, Sampling(**DRAWN))
    assert sum(read) == 3
    apart = DecodeEngine(model, 1, 40)
    for number, row in enumerate(rows):
        alone = apart.generate([row], Sampling(**DRAWN), row_ids=[number])
        assert together.tokens[number] == alone.tokens[0]
        torch.testing.assert_close(torch.tensor(together.logprobs[number]), torch.tensor(alone.logprobs[0]))
    assert len({tuple(together.tokens[number]) for number in (0, 2, 4)}) == 3, "draws of one prompt differ"
