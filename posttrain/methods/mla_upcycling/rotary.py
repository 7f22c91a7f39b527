"""How the KV heads' rotary pairs become one shared rotary key (RoRoPE, TransMLA section 4; arXiv 2502.07864).

Every KV head turns pair l by the same angle, so an orthogonal U_l in R^{G x G} applied to both halves of the pair
across heads commutes with RoPE, and U_l[j, g(h)] · q_{h,l} gives the same scores. Keeping the rotation on component 0
alone leaves one shared key k_r,l = sum_g U_l[0, g] k_{g,l}; what the others carry is position-free or dropped.

Layout: `moment` is E[k kᵀ] of the un-repeated pre-RoPE keys, [G·d_h, G·d_h], rows by head, then by row of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def head_moments(moment: Tensor, rope_rows: list[int], kv_heads: int) -> Tensor:
    """C_l = E[a_l a_lᵀ + b_l b_lᵀ] across KV heads for each kept pair; uncentred.

    Args:
        rope_rows: d_r rows of a head, row i pairs with row i + d_r/2.

    Returns:
        [d_r/2, G, G]
    """
    head_dim = moment.shape[0] // kv_heads
    split = moment.reshape(kv_heads, head_dim, kv_heads, head_dim)
    by_row = split.diagonal(dim1=1, dim2=3).permute(2, 0, 1)  # [d_h, G, G]
    first, second = torch.tensor(rope_rows, device=moment.device).chunk(2)
    return by_row[first] + by_row[second]


def rotations(head_moment: Tensor) -> Tensor:
    """U_l: its rows are the eigenvectors of C_l, largest eigenvalue first.

    Each row's largest entry is made positive, so that the result does not depend on the eigensolver.

    Args:
        head_moment: [pairs, G, G] symmetric.

    Returns:
        [pairs, G, G], each orthogonal.
    """
    _, vectors = torch.linalg.eigh(head_moment)
    rows = vectors.flip(-1).transpose(-1, -2)
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows.dtype)


def principal_weights(head_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the RoRoPE shared key: k_r,l = sum_g key[l, g] k_{g,l}, and q_{h,r,l} = query[l, g(h)] q_{h,l}.

    Returns:
        key and query weights, [pairs, G] each; here both are U_l[0].
    """
    leading = rotations(head_moment)[:, 0]
    return leading, leading.clone()


def mean_weights(head_moment: Tensor) -> tuple[Tensor, Tensor]:
    """As `principal_weights`, for the average over KV heads and unchanged queries (X-EcoMLA)."""
    shape = head_moment.shape[:2]
    return head_moment.new_full(shape, 1.0 / shape[1]), head_moment.new_ones(shape)


def shared_key_rows(key_weights: Tensor, rope_rows: list[int], head_dim: int) -> Tensor:
    """The map from un-repeated keys to the shared rotary key.

    Returns:
        [d_r, G·d_h], half-split rows.
    """
    pairs, kv_heads = key_weights.shape
    rows = key_weights.new_zeros(2 * pairs, kv_heads, head_dim)
    index = torch.arange(2 * pairs, device=rows.device)
    rows[index, :, torch.tensor(rope_rows, device=rows.device)] = key_weights.repeat(2, 1)
    return rows.flatten(1)


def carried_rows(query_weights: Tensor, rope_rows: list[int], head_dim: int) -> Tensor:
    """The map from the shared rotary key back to the key each head sees through its weighted query.

    Returns:
        [G·d_h, d_r]
    """
    return shared_key_rows(query_weights, rope_rows, head_dim).T
