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


def pair_maps(key_weights: Tensor, query_weights: Tensor, rope_rows: list[int], head_dim: int) -> tuple[Tensor, Tensor]:
    """The linear maps of a choice of pairs with one weight per KV head.

    Args:
        key_weights, query_weights: [d_r/2, G].

    Returns:
        `rotary_key` [d_r, G·d_h], from un-repeated keys, and `rotary_query` [G, d_r, d_h], from a query head of each
        group; half-split rows.
    """
    pairs, kv_heads = key_weights.shape
    index, rows = torch.arange(2 * pairs), torch.tensor(rope_rows)
    key = key_weights.new_zeros(2 * pairs, kv_heads, head_dim)
    key[index, :, rows] = key_weights.repeat(2, 1)
    query = query_weights.new_zeros(kv_heads, 2 * pairs, head_dim)
    query[:, index, rows] = query_weights.repeat(2, 1).T
    return key.flatten(1), query


def folded_maps(moment: Tensor, kv_heads: int, fold: int, kept: int) -> tuple[Tensor, Tensor]:
    """RoRoPE with FreqFold: the `kept` leading directions over `fold` adjacent pairs of all KV heads, block by block.

    The `fold` pairs of a block are treated as if they turned alike, so that one orthogonal matrix over G·fold complex
    entries commutes with RoPE; with fold 1 they do, and it does.

    Returns:
        as `pair_maps`, d_r = d_h/fold · kept; rotary pair b·kept + j is component j of block b.
    """
    head_dim = moment.shape[0] // kv_heads
    blocks = head_dim // 2 // fold
    layout = (kv_heads, 2, blocks, fold)
    split = moment.reshape(*layout, *layout)
    same_half = split.diagonal(dim1=1, dim2=5).sum(-1)  # [G, blocks, F, G, blocks, F]
    joint = same_half.diagonal(dim1=1, dim2=4).permute(4, 0, 1, 2, 3)  # [blocks, G, F, G, F]
    leading = rotations(joint.reshape(blocks, kv_heads * fold, -1))[:, :kept].unflatten(-1, (kv_heads, fold))
    key = moment.new_zeros(2, blocks, kept, *layout)
    for half in range(2):
        for block in range(blocks):
            key[half, block, :, :, half, block] = leading[block]
    key = key.reshape(2 * blocks * kept, kv_heads, head_dim)
    return key.flatten(1), key.transpose(0, 1).contiguous()


def carried_rows(rotary_query: Tensor) -> Tensor:
    """The map [G·d_h, d_r] from the shared rotary key back to the keys that heads see through their rotary queries."""
    return rotary_query.transpose(1, 2).flatten(0, 1)
