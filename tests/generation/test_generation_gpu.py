"""On a GPU: captured steps against eager ones and against transformers; compaction, new weights, random numbers."""

from __future__ import annotations

import pytest
import torch
from generation_models import MIXED, MODELS, full_logprobs, generate, make_upcycled, prompts

from posttrain.errors import StageError
from posttrain.generation import DecodeEngine, Sampling
from posttrain.generation.engine import STEPS_BETWEEN_LOOKS
from posttrain.generation.graphs import MOST_PROGRAMS
from posttrain.generation.sampling import choose, draw, uniforms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = [
    "llama",
    "qwen2",
    "qwen3",
    "biases",
    "llama3 rope",
    "mixed",
    "latent, low-rank query",
    "latent, wide values",
    "hybrid",
    "states",
]
DRAWN = {"max_new_tokens": 24, "temperature": 1.0, "seed": 7}


@pytest.fixture(autouse=True)
def _exact_matrix_products():
    """fp32 products without TF32: tokens are compared one by one."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    model, rows = MODELS[name]().cuda(), prompts((5, 9, 12, 1, 12, 30, 7, 7, 7, 2))
    answers = DecodeEngine(model, len(rows), 96, dtype=torch.float32).generate(rows, Sampling(max_new_tokens=40))
    assert answers.tokens == generate(model, rows, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixed", "hybrid"])
def test_a_captured_step_is_the_eager_step(name: str, filters: dict, dtype: torch.dtype) -> None:
    model, rows = MODELS[name]().cuda(), prompts((5, 9, 12, 1, 12, 30, 7, 7, 7, 2, 18, 3))
    sampling = Sampling(**{**DRAWN, **filters})
    captured, eager = (
        DecodeEngine(model, 12, 64, dtype=dtype, graphs=graphs).generate(rows, sampling) for graphs in (True, False)
    )
    assert captured.tokens == eager.tokens
    assert captured.logprobs == eager.logprobs


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixed"])
def test_log_probabilities_are_those_of_a_full_forward(name: str) -> None:
    model, rows = MODELS[name]().cuda(), prompts()
    answers = DecodeEngine(model, 8, 64, dtype=torch.float32).generate(rows, Sampling(**DRAWN))
    for row, answer, logprobs in zip(rows, answers.tokens, answers.logprobs, strict=True):
        expected = full_logprobs(model, row, answer).cpu()
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_waves_and_compaction_change_no_token(temperature: float) -> None:
    model, rows = make_upcycled(mixers=MIXED).cuda(), prompts((9,) * 40)
    sampling = Sampling(max_new_tokens=60, temperature=temperature, seed=2)
    free = DecodeEngine(model, 40, 80, dtype=torch.float32).generate(rows, sampling)
    stop = tuple({answer[5] for answer in free.tokens[:10]})
    expected = [_cut(answer, stop) for answer in free.tokens]
    # At the first look, after 17 tokens, some rows go on and a smaller batch size than 40 holds them.
    assert 0 < sum(len(answer) > 1 + STEPS_BETWEEN_LOOKS for answer in expected) <= 32
    ragged = sampling.model_copy(update={"stop": stop})
    for max_rows in (40, 17):
        engine = DecodeEngine(model, max_rows, 80, dtype=torch.float32)
        widths, advance = [], engine._advance
        engine._advance = lambda rows, sampling: (widths.append(rows), advance(rows, sampling))[1]  # noqa: B023
        answers = engine.generate(rows, ragged)
        assert answers.tokens == expected
        assert answers.finished == [answer[-1] in stop for answer in expected]
        if max_rows == len(rows):  # one wave, so that only compaction makes a batch smaller
            assert widths[0] == max_rows and min(widths) < max_rows


def test_new_weights_need_no_new_capture() -> None:
    model, rows, sampling = make_upcycled(mixers=MIXED).cuda(), prompts(), Sampling(max_new_tokens=24)
    engine = DecodeEngine(model, 5, 64, dtype=torch.float32)
    first = engine.generate(rows, sampling).tokens
    graphs = [dict(graphs) for graphs in engine._captured.programs.values()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert engine.generate(rows, sampling).tokens == first
    engine.load(model)
    assert engine.generate(rows, sampling).tokens == generate(model, rows, 24) != first
    assert list(engine._captured.programs.values()) == graphs


def test_settings_without_a_part_in_the_program_share_graphs() -> None:
    model, rows = MODELS["llama"]().cuda(), prompts()
    engine = DecodeEngine(model, 5, 64)
    for seed in (0, 1):
        for stop in ((), (3,)):
            engine.generate(rows, Sampling(max_new_tokens=10 + seed, temperature=1.0, seed=seed, stop=stop))
    assert len(engine._captured) == 1
    engine.generate(rows, Sampling(max_new_tokens=10))
    assert len(engine._captured) == 2


def test_an_annealed_temperature_keeps_a_handful_of_graphs() -> None:
    model, rows = MODELS["mixed"]().cuda(), prompts()
    engine = DecodeEngine(model, 5, 64)
    temperatures = [0.5 + step / 20 for step in range(3 * MOST_PROGRAMS)]

    def anneal() -> list[list[list[int]]]:
        settings = [Sampling(max_new_tokens=8, temperature=temperature) for temperature in temperatures]
        return [engine.generate(rows, sampling).tokens for sampling in settings]

    first = anneal()
    before = held()
    assert anneal() == first
    assert len(engine._captured) == MOST_PROGRAMS and held() <= before + 2**20


def test_double_precision_is_for_a_cpu() -> None:
    with pytest.raises(StageError, match="fp64 is for a CPU"):
        DecodeEngine(MODELS["llama"]().cuda(), 5, 64, dtype=torch.float64)


def test_nothing_is_left_when_the_engine_goes() -> None:
    model, rows = MODELS["mixed"]().cuda(), prompts()
    DecodeEngine(model, 8, 64).generate(rows, Sampling(max_new_tokens=8))
    before = held()
    engine = DecodeEngine(model, 64, 2048)
    engine.generate(rows, Sampling(max_new_tokens=8))
    del engine
    assert held() <= before + 2**20


def held() -> int:
    """Bytes in use without cuBLAS's workspaces, which come with a stream and stay."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_random_numbers_and_draws_are_those_of_the_cpu() -> None:
    rows = torch.arange(64)
    table = uniforms(5, rows, 32)
    assert torch.equal(uniforms(5, rows.cuda(), 32).cpu(), table)
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 3
    drawn = draw(logits.cuda(), table[:, 0].cuda()).cpu()
    assert (drawn == draw(logits, table[:, 0])).float().mean() > 0.98, "the last bit of a sum may move a draw"


def test_no_zero_probability_on_the_gpu() -> None:
    logits = torch.full((4000, 5000), -torch.inf, device="cuda")
    logits[:, ::7] = 0.0
    u = torch.cat((uniforms(0, torch.arange(3990), 1)[:, 0], 1 - 2.0 ** -torch.arange(44, 54, dtype=torch.float64)))
    assert set((draw(logits, u.cuda()) % 7).tolist()) == {0}
    token, logprob = choose(logits.bfloat16(), Sampling(temperature=1.0), u.cuda())
    assert logprob.isfinite().all() and set((token % 7).tolist()) == {0}


def _cut(answer: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(answer) if token in stop]
    return answer[: ends[0] + 1] if ends else answer
