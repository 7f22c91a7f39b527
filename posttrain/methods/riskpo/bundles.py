"""Bundles of questions, and which answers stand together: the same on every rank, from (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ORDER, CLASSES, PAIRING, DRAWS = range(4)
"""Streams of random numbers of one step."""

_MASK = (1 << 64) - 1


def generator(seed: int, step: int, stream: int) -> torch.Generator:
    """Random numbers of one step: the same wherever and whenever they are drawn. The global generator is not used."""
    state = 0
    for word in (seed, step, stream):
        state = _mixed(state ^ (word & _MASK))
    return torch.Generator().manual_seed(state >> 1)


def _mixed(value: int) -> int:
    """splitmix64: neighbouring inputs give unrelated outputs."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class Bundling:
    """N bundles of B questions in G copies, each answer in exactly one copy of one bundle."""

    members: Tensor  # [N, B] questions
    pairing: Tensor  # [Q, G] answers: copy j takes answer pairing[q, j] of question q

    def gather(self, values: Tensor) -> Tensor:
        """`[Q, G]` to `[N, B, G]`: question by question what the copies of each bundle are made of."""
        return values.gather(1, self.pairing)[self.members]

    def scatter(self, values: Tensor) -> Tensor:
        """`[N, B, G]` back to `[Q, G]`: the inverse of `gather`."""
        by_question = torch.empty(self.pairing.shape, dtype=values.dtype, device=values.device)
        by_question[self.members.flatten()] = values.flatten(0, 1)
        return torch.empty_like(by_question).scatter_(1, self.pairing, by_question)


def bundle(
    questions: int, generations: int, size: int, *, strategy: str, difficulty: Tensor, seed: int, step: int
) -> Bundling:
    """The bundles of a batch, and for each question a permutation of its answers.

    Args:
        strategy: random; stratified: neighbours in order of difficulty share a bundle; anti_stratified: each bundle has
            one question of each of `size` classes of difficulty.
        difficulty: `[Q]`, of which only the order counts; equal ones are in random order.

    Raises:
        ValueError: `questions` is not a multiple of `size`.
    """
    if questions % size:
        raise ValueError(f"{questions} questions are not a multiple of the bundle size {size}")
    order = torch.randperm(questions, generator=generator(seed, step, ORDER))
    if strategy != "random":
        order = order[difficulty[order].argsort(stable=True)]
    if strategy == "anti_stratified":
        # Equally difficult questions are in random order, unequal ones are not: the class is shuffled as well.
        classes = order.view(size, -1)
        shuffle = torch.rand(classes.shape, generator=generator(seed, step, CLASSES)).argsort(1)
        members = classes.gather(1, shuffle).T
    else:
        members = order.view(-1, size)
    pairing = torch.rand(questions, generations, generator=generator(seed, step, PAIRING), dtype=torch.float64)
    return Bundling(members.contiguous(), pairing.argsort(1))
