"""Which layers stay attention: from scores to a set. No model is touched here; scores come from whoever measured.

A score says how much the hybrid gains when that layer is attention: larger is better. `smart` is Zebra-Llama's choice
(arXiv 2505.17272), whose search was not released; its rules are reconstructed and hold for every published list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from posttrain.errors import RecipeError
from posttrain.methods.hybrid_ssm.config import Method
from posttrain.models.architecture import STATE_SIZE, cache_elements_per_token, normalise, state_elements

Scores = Sequence[float]
Costs = Sequence[tuple[float, float]]


def select_layers(
    scores: Scores | Callable[[tuple[int, ...]], Scores],
    n_keep: int | None = None,
    method: Method = "smart",
    *,
    costs: Costs | None = None,
    budget: float | None = None,
) -> list[int]:
    """Indices of the layers to keep as attention, in order.

    - `smart` the best layer of the first ⌊L/N⌋, the best of the last ⌊L/N⌋, and between them the highest sum of scores
      whose gaps differ by at most one layer
    - `uniform` every (L/N)-th layer from the first; scores only say how many layers there are
    - `greedy_kl` one layer after the other, the best given those kept already (arXiv 2512.20569)
    - `budget` the highest sum of scores whose cache fits `budget` bytes: any number of layers, anywhere

    Equal sums: the set with the earlier layers.

    Args:
        scores: one number a layer. For `greedy_kl` a function of the layers kept so far that scores all layers again.
        n_keep: N, for all but `budget`.
        costs: for `budget`, bytes of each layer's cache as attention and as a state: `layer_costs`.

    Raises:
        RecipeError: what is given does not fit the method, or no set fits the budget.
    """
    if method == "greedy_kl":
        if not callable(scores):
            _refuse("greedy_kl scores again after each layer", "give a function of the layers kept so far")
        return _greedy(scores, n_keep)
    if callable(scores):
        _refuse(f"{method} scores every layer once", "give one number a layer")
    values = _numbers(scores)
    if method == "budget":
        return _within(values, costs, budget)
    if method not in ("smart", "uniform"):
        _refuse(f"method {method!r} is unknown", "smart, uniform, greedy_kl or budget")
    count = _count(n_keep, len(values))
    if method == "uniform":
        return [index * len(values) // count for index in range(count)]
    return _smart(values, count)


def is_feasible(kept: Sequence[int], layers: int) -> bool:
    """Whether `smart` could choose these layers, whatever the scores."""
    kept, window = list(kept), layers // len(kept)
    if sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= layers:
        return False
    if len(kept) == 1:
        return True
    low, high = _gaps(kept[0], kept[-1], len(kept))
    between = (second - first - 1 for first, second in zip(kept, kept[1:], strict=False))
    return kept[0] < window and kept[-1] >= layers - window and all(low <= gap <= high for gap in between)


def count_feasible(first: int, last: int, count: int) -> int:
    """How many sets of `count` layers with these ends keep even gaps: what the scores have to choose between."""
    if count < 2:
        return int(first == last and count == 1)
    low, high = _gaps(first, last, count)

    @cache
    def ways(at: int, left: int) -> int:
        if left == 0:
            return int(at == last)
        return sum(ways(at + 1 + gap, left - 1) for gap in range(low, high + 1) if at + 1 + gap <= last)

    return ways(first, count - 1)


def layer_costs(
    config: Mapping[str, Any],
    tokens: int,
    conv_kernel: int = 4,
    repeat_before_conv: bool = False,
    element_size: int = 2,
    state_size: int = STATE_SIZE,
) -> list[tuple[int, int]]:
    """Bytes of each layer's cache for one sequence of `tokens` tokens: as attention of the given model, as a state.

    The constant state is counted: at short contexts it may be larger than what it replaces.
    """
    arch = normalise(config)
    states = {**arch, "mixers": ["mamba2"] * arch["num_hidden_layers"]}
    states |= {"mamba_conv_kernel": conv_kernel, "mamba_repeat_before_conv": repeat_before_conv}
    return [
        (tokens * elements * element_size, state * state_size + columns * element_size)
        for elements, (state, columns) in zip(cache_elements_per_token(arch), state_elements(states), strict=True)
    ]


def _smart(scores: list[float], count: int) -> list[int]:
    layers, window = len(scores), len(scores) // count
    if count == 1:
        return [_best(range(layers), scores)]
    first, last = _best(range(window), scores), _best(range(layers - window, layers), scores)
    low, high = _gaps(first, last, count)

    @cache
    def best_from(at: int, left: int) -> tuple[float, tuple[int, ...]] | None:
        """Highest sum, and earliest layers among equals, of a way from `at` to the last with `left` more layers."""
        if left == 0:
            return (scores[at], (at,)) if at == last else None
        found = None
        for gap in range(low, high + 1):
            rest = best_from(at + 1 + gap, left - 1) if at + 1 + gap <= last else None
            if rest is not None and (found is None or scores[at] + rest[0] > found[0]):
                found = (scores[at] + rest[0], (at, *rest[1]))
        return found

    return list(best_from(first, count - 1)[1])


def _gaps(first: int, last: int, count: int) -> tuple[int, int]:
    """Fewest and most layers between neighbours when they are spread evenly over first … last."""
    free = last - first - count + 1
    return free // (count - 1), -(-free // (count - 1))


def _greedy(score: Callable[[tuple[int, ...]], Scores], n_keep: int | None) -> list[int]:
    kept: list[int] = []
    values = _numbers(score(()))
    for step in range(_count(n_keep, len(values))):
        if step:
            values = _numbers(score(tuple(sorted(kept))))
        kept.append(_best((index for index in range(len(values)) if index not in kept), values))
    return sorted(kept)


def _within(scores: list[float], costs: Costs | None, budget: float | None) -> list[int]:
    if costs is None or budget is None or len(costs) != len(scores):
        _refuse("budget needs a limit in bytes, and two costs for each layer", "give budget and costs=layer_costs(...)")
    # Sets of the layers so far that no other beats in both bytes and score, by bytes: (bytes, −score, layers).
    front: list[tuple[float, float, tuple[int, ...]]] = [(0, 0, ())]
    for index, (score, (attention, state)) in enumerate(zip(scores, costs, strict=True)):
        kept = [(size + attention, loss - score, (*layers, index)) for size, loss, layers in front]
        left = [(size + state, loss, layers) for size, loss, layers in front]
        front = []
        for option in sorted(kept + left, key=lambda option: (option[0], option[1], _earliest(option[2]))):
            if not front or option[1] < front[-1][1]:
                front.append(option)
    fitting = [option for option in front if option[0] <= budget]
    if not fitting:
        least = min(option[0] for option in front)
        _refuse(f"no choice of layers fits {budget:,.0f} bytes; the smallest takes {least:,.0f}", "raise budget")
    return list(min(fitting, key=lambda option: option[1])[2])


def _earliest(layers: tuple[int, ...]) -> tuple[float, ...]:
    """Orders sets by their first difference, the earlier layer first; a set before what it begins with."""
    return (*layers, math.inf)


def _best(indices: Any, scores: list[float]) -> int:
    return max(indices, key=lambda index: (scores[index], -index))


def _numbers(scores: Scores) -> list[float]:
    values = [float(value) for value in scores]
    if not values or not all(map(math.isfinite, values)):
        _refuse(f"scores must be finite numbers, one a layer, not {values}", "measure again")
    return values


def _count(n_keep: int | None, layers: int) -> int:
    if n_keep is None or not 1 <= n_keep <= layers:
        _refuse(f"n_keep is {n_keep}", f"between 1 and the {layers} layers")
    return n_keep


def _refuse(what: str, fix: str) -> None:
    raise RecipeError(what, where="select_layers", fix=fix)
