"""Which FreqFold a layer gets: the one whose attention scores err least, from moments alone.

A score of query q (group g) and key k at distance τ is qᵀ R(τ) k_g in the source, and with a shared rotary key
q k_g + (C_g q)ᵀ (R'(τ) − 1) K k, where K, C_g are the rotary maps and R' turns with the kept frequencies. With queries
and keys taken as independent the mean squared difference is tr(Aᵀ Q_g A M), A the difference of the two forms,
Q_g = Σ E[q qᵀ] over the group's heads, M = E[k kᵀ]. TransMLA's code searches on perplexity instead; captured energy is
no guide, since folding captures more of it by mixing frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.methods.mla_upcycling import rotary

DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def candidates(head_dim: int, rope_dim: int) -> list[int]:
    """head_dim/d_r times 1, 2, 4, …, as long as it divides head_dim/2."""
    fold, found = head_dim // rope_dim, []
    while head_dim // 2 % fold == 0:
        found.append(fold)
        fold *= 2
    return found


def best_fold(
    key_moment: Tensor, query_moments: Tensor, frequencies: Tensor, rope_dim: int
) -> tuple[int, dict[int, float]]:
    """The candidate with the least `score_error`, and the errors of all.

    Args:
        key_moment: E[k kᵀ] [G·d_h, G·d_h] of pre-RoPE keys; query_moments: [G, d_h, d_h], summed over a group's heads.
        frequencies: of the source, [d_h/2].
    """
    kv_heads, head_dim = query_moments.shape[:2]
    errors = {}
    for fold in candidates(head_dim, rope_dim):
        maps = rotary.folded_maps(key_moment, kv_heads, fold, fold * rope_dim // head_dim)
        errors[fold] = score_error(maps, key_moment, query_moments, frequencies)
    return min(errors, key=errors.__getitem__), errors


def score_error(maps: tuple[Tensor, Tensor], key_moment: Tensor, query_moments: Tensor, frequencies: Tensor) -> float:
    """Relative root mean square error of pre-softmax scores over `DISTANCES`, of a shared rotary key of `maps`."""
    rotary_key, rotary_query = maps
    kv_heads, head_dim = query_moments.shape[:2]
    kept = frequencies[:: head_dim // len(rotary_key)]
    lost = total = 0.0
    for distance in DISTANCES:
        turned = _turn(frequencies * distance)  # [d_h, d_h]
        shared = rotary_query.mT @ ((_turn(kept * distance) - torch.eye(len(rotary_key)).to(kept)) @ rotary_key)
        for group in range(kv_heads):
            own = slice(group * head_dim, (group + 1) * head_dim)
            source = key_moment.new_zeros(head_dim, len(key_moment))
            source[:, own] = turned
            ours = shared[group].clone()  # [d_h, G·d_h]
            ours[:, own] += torch.eye(head_dim).to(kept)
            lost += _energy(source - ours, query_moments[group], key_moment)
            total += _energy(source, query_moments[group], key_moment)
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _turn(angles: Tensor) -> Tensor:
    """The rotation of a half-split vector by `angles` [n], as a matrix [2n, 2n]."""
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def _energy(form: Tensor, query_moment: Tensor, key_moment: Tensor) -> float:
    """E[(qᵀ form k)²] for independent q and k."""
    return ((query_moment @ form) * (form @ key_moment)).sum().item()
