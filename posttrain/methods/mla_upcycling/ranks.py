"""Ranks from spectra: how many latent elements each layer gets. Spectra are eigenvalues [N], largest first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import Tensor


def energy_rank(spectrum: Tensor, energy: float, multiple: int = 1, rule: str = "at_least") -> int:
    """The rank that keeps a share `energy` of the spectrum's sum, rounded up to `multiple`, at most N.

    Args:
        rule: at_least: the smallest R with e_R ≥ energy (the X-EcoMLA paper). released: max(1, #{i: e_i ≤ energy}), as
            its code computes: one short before the rounding.
    """
    size = spectrum.numel()
    kept = spectrum.cumsum(0) / spectrum.sum()
    if energy >= 1:
        rank = size
    elif rule == "released":
        rank = max(1, int((kept <= energy).sum()))
    else:
        rank = int((kept < energy).sum()) + 1
    return min(size, -(-rank // multiple) * multiple)


def water_fill(spectra: Sequence[Tensor], total: int, multiple: int) -> list[int]:
    """Ranks, multiples of `multiple`, of sum at most `total` that lose the least: sum of relative lost energies.

    Greedy by chunks is optimal, since the chunk sums of a descending spectrum descend. Every layer gets one multiple.

    Raises:
        ValueError: `total` is less than one multiple for every layer.
    """
    if total < multiple * len(spectra):
        raise ValueError(f"{total} latent elements are less than {multiple} for each of {len(spectra)} layers")
    chunks = [(spectrum / spectrum.sum()).unfold(0, multiple, multiple).sum(1).tolist() for spectrum in spectra]
    ranks, left = [1] * len(spectra), total // multiple - len(spectra)
    queue = [(-found[1], layer) for layer, found in enumerate(chunks) if len(found) > 1]
    heapq.heapify(queue)
    while queue and left > 0:
        _, layer = heapq.heappop(queue)
        ranks[layer], left = ranks[layer] + 1, left - 1
        if ranks[layer] < len(chunks[layer]):
            heapq.heappush(queue, (-chunks[layer][ranks[layer]], layer))
    return [rank * multiple for rank in ranks]
