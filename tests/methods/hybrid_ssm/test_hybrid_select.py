"""Which layers stay attention: the published lists, brute force, ties, budgets with the constant state."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from posttrain.errors import RecipeError
from posttrain.methods.hybrid_ssm import count_feasible, is_feasible, layer_costs, select_layers

PUBLISHED = [  # layers of the model, those kept (method card, section 4)
    (16, [0, 5, 10, 14]),
    (16, [0, 2, 5, 8, 11, 14]),
    (16, list(range(0, 16, 2))),
    (28, [0, 5, 10, 16, 21, 26]),
    (28, [0, 3, 7, 10, 14, 18, 22, 26]),
    (28, list(range(0, 28, 2))),
    (32, [0, 4, 8, 12, 16, 20, 25, 30]),
    (32, list(range(0, 32, 2))),
    (28, [0, 9, 18, 26]),
    (28, [0, 5, 10, 14, 18, 22, 26]),
    (28, [0, 3, 6, 9, 12, 15, 19, 23, 26]),
    (28, [0, 4, 9, 14, 19, 23, 27]),
    (36, [3, 11, 19, 27, 35]),
    (28, [2, 6, 10, 14, 18, 22, 27]),
]


def earliest(sets):
    return min(sets, key=lambda kept: (*kept, float("inf")))


def brute_force(scores: list[int], count: int) -> list[int]:
    """The rules of section 4 word for word, over all subsets."""
    layers, window = len(scores), len(scores) // count
    first = max(range(window), key=lambda index: (scores[index], -index))
    last = max(range(layers - window, layers), key=lambda index: (scores[index], -index))
    sets = []
    for kept in itertools.combinations(range(layers), count):
        if count == 1:
            sets.append(kept)
            continue
        free = (kept[-1] - kept[0] - count + 1) / (count - 1)
        gaps = [b - a - 1 for a, b in itertools.pairwise(kept)]
        low, high = int(free // 1), int(-(-free // 1))
        if (kept[0], kept[-1]) == (first, last) and all(low <= gap <= high for gap in gaps):
            sets.append(kept)
    best = max(sum(scores[index] for index in kept) for kept in sets)
    return list(earliest(kept for kept in sets if sum(scores[index] for index in kept) == best))


@pytest.mark.parametrize(("layers", "kept"), PUBLISHED, ids=str)
def test_published_lists_follow_the_rules(layers: int, kept: list[int]) -> None:
    assert is_feasible(kept, layers)
    scores = [1.0 if index in kept else 0.0 for index in range(layers)]
    assert select_layers(scores, len(kept), "smart") == kept


@pytest.mark.parametrize(
    "kept", [[1, 2, 3, 14], [5, 9, 12, 14], [0, 5, 10, 10], [0, 5, 10, 16], [10, 5, 0, 14]], ids=str
)
def test_other_lists_do_not(kept: list[int]) -> None:
    assert not is_feasible(kept, 16)


def test_a_clustered_list_is_what_the_rules_forbid() -> None:
    assert not is_feasible([14, 19, 20, 23, 24, 26, 27], 28)


@pytest.mark.parametrize("layers", range(1, 13))
def test_smart_equals_brute_force(layers: int) -> None:
    generator = random.Random(layers)
    for count in range(1, layers + 1):
        for spread in (1, 3, 1000):  # many ties, some, none
            scores = [generator.randrange(spread + 1) for _ in range(layers)]
            assert select_layers(scores, count, "smart") == brute_force(scores, count), (scores, count)


def test_few_sets_are_feasible_between_given_ends() -> None:
    for _, kept in PUBLISHED:
        gaps, free = len(kept) - 1, kept[-1] - kept[0] - len(kept) + 1
        # `free % gaps` of the gaps are one longer than the others.
        assert count_feasible(kept[0], kept[-1], len(kept)) == math.comb(gaps, free % gaps)
    assert [count_feasible(kept[0], kept[-1], len(kept)) for _, kept in PUBLISHED[:8]] == [3, 5, 1, 5, 21, 1, 21, 1]
    inner = itertools.combinations(range(1, 14), 4)
    assert sum(is_feasible([0, *middle, 14], 16) for middle in inner) == count_feasible(0, 14, 6)
    assert (count_feasible(3, 3, 1), count_feasible(3, 4, 1)) == (1, 0)


def test_uniform_is_even() -> None:
    assert select_layers([0.0] * 16, 8, "uniform") == list(range(0, 16, 2))
    assert select_layers([0.0] * 10, 4, "uniform") == [0, 2, 5, 7]
    assert select_layers([0.0] * 3, 3, "uniform") == [0, 1, 2]


def test_greedy_scores_again_after_each_layer() -> None:
    asked = []

    def scores(kept: tuple[int, ...]) -> list[float]:
        """Layers 4 and 5 are worth most, but only one of them."""
        asked.append(kept)
        values = [0.1, 3.0, 0.2, 0.0, 5.0, 4.9]
        return [0.0, 3.0, 0.2, 0.0, 0.0, 0.0] if {4, 5} & set(kept) else values

    assert select_layers(scores, 2, "greedy_kl") == [1, 4]
    assert asked == [(), (4,)]
    assert select_layers(lambda kept: [1.0] * 4, 2, "greedy_kl") == [0, 1]


def test_a_budget_equals_brute_force() -> None:
    generator = random.Random(0)
    for layers in (1, 4, 8):
        for _ in range(20):
            scores = [generator.randrange(-2, 5) for _ in range(layers)]
            costs = [(generator.randrange(1, 9), generator.randrange(1, 5)) for _ in range(layers)]
            budget = generator.randrange(2 * layers, 8 * layers)
            best = None
            for number in range(2**layers):
                kept = [index for index in range(layers) if number >> index & 1]
                size = sum(costs[index][index not in kept] for index in range(layers))
                value = sum(scores[index] for index in kept)
                if size <= budget and (best is None or value > best):
                    best = value
            if best is None:
                with pytest.raises(RecipeError, match="no choice of layers fits"):
                    select_layers(scores, method="budget", costs=costs, budget=budget)
                continue
            kept = select_layers(scores, method="budget", costs=costs, budget=budget)
            assert sum(scores[index] for index in kept) == best
            assert sum(costs[index][index not in kept] for index in range(layers)) <= budget


LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def test_costs_count_the_state() -> None:
    assert layer_costs(LLAMA, 1000, state_size=2) == [(1000 * 2048, 2 * 143_360)] * 16
    # A state of fp32 outweighs attention below 268 tokens: then keeping attention is what saves bytes.
    state = 131_072 * 4 + 12_288 * 2
    short, scores = layer_costs(LLAMA, 200), [1.0] * 16
    assert short == [(200 * 2048, state)] * 16
    assert select_layers(scores, method="budget", costs=short, budget=16 * 200 * 2048) == list(range(16))
    long = layer_costs(LLAMA, 8192)
    quarter = 4 * 8192 * 2048 + 12 * state
    assert select_layers([*range(16)], method="budget", costs=long, budget=quarter) == [12, 13, 14, 15]
    assert select_layers([*range(16)], method="budget", costs=long, budget=quarter - 1) == [13, 14, 15]


def test_equal_costs_stay_quick() -> None:
    scores = [random.Random(index).random() for index in range(96)]
    costs = layer_costs({**LLAMA, "num_hidden_layers": 96}, 8192)
    kept = select_layers(scores, method="budget", costs=costs, budget=5e8)
    assert kept == sorted(sorted(range(96), key=lambda index: -scores[index])[: len(kept)]) and 0 < len(kept) < 96


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0, float("nan")], 1), "finite"),
        (([], 1), "finite"),
        (([1.0], 2), "n_keep is 2"),
        (([1.0], None), "n_keep is None"),
        (([1.0], 1, "best"), "'best' is unknown"),
        (([1.0], 1, "greedy_kl"), "scores again"),
        ((lambda kept: [1.0], 1, "smart"), "one number a layer"),
        (([1.0], None, "budget"), "limit in bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        select_layers(*arguments)
