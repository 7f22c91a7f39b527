"""Rows moved to the left edge: the numbers are those of TRL on its own padded rows, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_world import asked_rows, make_policy, make_trainer

from posttrain.errors import StageError
from posttrain.models.tiny import tiny_tokenizer
from posttrain.policy.alignment import align, back

PAD = 258


def padded(prompts: list[list[int]], completions: list[list[int]], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts at the right and completions at the left of their columns, as TRL has them; `extra` columns a side."""
    left, right = max(map(len, prompts)) + extra, max(map(len, completions)) + extra
    ids = [
        [PAD] * (left - len(one)) + one + two + [PAD] * (right - len(two))
        for one, two in zip(prompts, completions, strict=True)
    ]
    mask = [
        [0] * (left - len(one)) + [1] * (len(one) + len(two)) + [0] * (right - len(two))
        for one, two in zip(prompts, completions, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def some(count: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


RAGGED = [some(n, n) for n in (3, 9, 1, 5, 2)], [some(n, 50 + n) for n in (4, 1, 7, 2, 7)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_trainer("grpo", tmp_path_factory.mktemp("ours"), model=make_policy(initializer_range=0.2))


@pytest.fixture(scope="module")
def theirs(ours: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Any]:
    """TRL's own trainer at a temperature, with the same model."""
    fixed = {"use_cpu": True, "bf16": False, "report_to": [], "num_generations": 2}

    @cache
    def make(temperature: float) -> Any:
        folder = tmp_path_factory.mktemp("theirs")
        return trl.GRPOTrainer(
            model=make_policy(initializer_range=0.2),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(output_dir=str(folder), temperature=temperature, **fixed),
            train_dataset=asked_rows(ours),
            processing_class=tiny_tokenizer(),
        )

    return make


def scores(
    trainer: Any, ids: torch.Tensor, mask: torch.Tensor, completion: int, **options: Any
) -> tuple[Any, Any, Any]:
    """Log-probabilities, entropies, and the gradients of a sum of both that weighs every token differently."""
    model = trainer.model.train()
    model.zero_grad()
    logprobs, entropies, extra = trainer._get_per_token_logps_and_entropies(
        model, ids, mask, completion, compute_entropy=True, **options
    )
    assert extra is None
    wanted = mask[:, -completion:]
    weight = torch.linspace(0.5, 2.0, wanted.numel()).view(wanted.shape) * wanted
    (weight * (logprobs + 0.3 * entropies)).sum().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    return logprobs.detach() * wanted, entropies.detach() * wanted, gradients


def assert_equal(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> None:
    assert torch.allclose(one[0], other[0], atol=3e-5) and torch.allclose(one[1], other[1], atol=3e-5)
    assert one[2].keys() == other[2].keys()
    for name, gradient in other[2].items():
        assert torch.allclose(one[2][name], gradient, atol=2e-4, rtol=1e-3), name


@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_numbers_and_gradients_are_trls(
    ours: Any, theirs: Any, batch_size: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = padded(*RAGGED)
    monkeypatch.setattr(ours, "temperature", temperature)
    mine = scores(ours, ids, mask, 7, batch_size=batch_size)
    its = scores(theirs(temperature), ids, mask, 7)
    assert float(mine[0].min()) < -1 and float(mine[1].max()) > 1
    assert_equal(mine, its)


def test_a_row_whose_completion_is_masked_has_nothing_to_learn(ours: Any, theirs: Any) -> None:
    """As TRL masks truncated completions: the tokens stay, the mask does not."""
    ids, mask = padded(*RAGGED)
    mask[1, -7:] = mask[2, -7:] = 0
    mine = scores(ours, ids, mask, 7)
    assert not mine[0][1:3].any() and not mine[1][1:3].any()
    assert_equal(mine, scores(theirs(1.0), ids, mask, 7))


def test_a_batch_without_any_completion(ours: Any) -> None:
    ids, mask = padded(*RAGGED)
    mask[:, -7:] = 0
    logprobs, entropies, gradients = scores(ours, ids, mask, 7)
    assert not logprobs.any() and not entropies.any() and not any(one.any() for one in gradients.values())


def test_pictures_are_refused(ours: Any) -> None:
    ids, mask = padded(*RAGGED)
    with pytest.raises(StageError, match="not made for pixel_values"):
        ours._get_per_token_logps_and_entropies(ours.model, ids, mask, 7, pixel_values=torch.zeros(2))


ROWS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, extra=st.integers(0, 3), multiple=st.sampled_from([1, 4, 128]))
def test_every_token_finds_its_place(rows: list[tuple[int, int]], extra: int, multiple: int) -> None:
    prompts = [some(one, one) for one, _ in rows]
    completions = [some(two, 90 + two) for _, two in rows]
    ids, mask = padded(prompts, completions, extra)
    columns = max(map(len, completions)) + extra
    if columns == 0:
        return
    found = align(ids, mask, columns, multiple)
    width = max(len(one) + len(two) for one, two in zip(prompts, completions, strict=True))
    assert width <= found.input_ids.shape[1] <= ids.shape[1] or found.input_ids.shape[1] == 2
    if multiple == 1:
        assert found.input_ids.shape[1] == max(2, width)
    for row, (one, two) in enumerate(zip(prompts, completions, strict=True)):
        whole = [*one, *two]
        assert found.input_ids[row, : len(whole)].tolist() == whole
        assert found.mask[row].tolist() == [True] * len(two) + [False] * (columns - len(two))
        # The position before a token predicts it.
        predicted = [whole[place + 1] for place in found.places[row, : len(two)].tolist()]
        assert predicted == two
        assert found.scored[row].nonzero().flatten().tolist() == found.places[row, : len(two)].tolist()
    values = torch.arange(1.0, 1 + float(found.scored.sum()))
    home = back(values, found)
    assert home.shape == found.mask.shape and torch.equal(home[found.mask], values)
    assert not home[~found.mask].any()
