"""The mathematics on plain tensors, float64: rotations, moments and the low-rank step."""

from __future__ import annotations

import pytest
import torch
from methods.mla_upcycling import reference

from posttrain.methods.mla_upcycling import latent, rotary

HEADS, KV_HEADS, WIDTH = 4, 4, 8


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def keys_moment(tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    keys = random(tokens, KV_HEADS * WIDTH) @ random(KV_HEADS * WIDTH, KV_HEADS * WIDTH, seed=1)
    return keys, second_moment(keys)


def test_card_verification_8_rotations_are_orthogonal_and_sorted() -> None:
    _, moment = keys_moment()
    pairs = rotary.head_moments(moment, list(range(WIDTH)), KV_HEADS)
    turned = rotary.rotations(pairs)
    eye = torch.eye(KV_HEADS, dtype=torch.float64).expand_as(turned)
    torch.testing.assert_close(turned @ turned.mT, eye, atol=1e-12, rtol=0)
    energies = (turned @ pairs @ turned.mT).diagonal(dim1=1, dim2=2)
    assert (energies.diff(dim=1) <= 1e-9).all()


def test_head_moments_are_those_of_both_halves_of_a_pair() -> None:
    keys, moment = keys_moment()
    split = keys.view(-1, KV_HEADS, WIDTH)
    found = rotary.head_moments(moment, [1, 3, 5, 7], KV_HEADS)
    first, second = (second_moment(split[:, :, row]) + second_moment(split[:, :, row + 4]) for row in (1, 3))
    torch.testing.assert_close(found, torch.stack([first, second]))


def test_turning_every_component_gives_the_scores_of_the_source() -> None:
    """RoRoPE before anything is dropped: all G components keep RoPE, one head of width G·d_h."""
    steps, half = 12, WIDTH // 2
    q, k = random(HEADS, steps, WIDTH), random(KV_HEADS, steps, WIDTH, seed=5)
    frequencies, positions = torch.rand(half, dtype=torch.float64) + 0.1, torch.arange(steps, dtype=torch.float64) + 7
    _, moment = keys_moment()
    turned = rotary.rotations(rotary.head_moments(moment, list(range(WIDTH)), KV_HEADS))  # [half, G, G]
    scores = torch.zeros(HEADS, steps, steps, dtype=torch.float64)
    for component in range(KV_HEADS):
        weights = turned[:, component].repeat(2, 1)  # [d_h, G]
        shared = torch.einsum("lg,gtl->tl", weights, k)
        mine = weights.T[:, None] * q
        scores += reference.turn(mine, frequencies, positions) @ reference.turn(shared, frequencies, positions).T
    expected = reference.turn(q, frequencies, positions) @ reference.turn(k, frequencies, positions).mT
    torch.testing.assert_close(scores, expected, atol=1e-12, rtol=1e-12)


def test_the_principal_key_carries_more_energy_than_the_mean() -> None:
    _, moment = keys_moment()
    pairs = rotary.head_moments(moment, list(range(WIDTH)), KV_HEADS)
    carried = {}
    for name, weigh in (("principal", rotary.principal_weights), ("mean", rotary.mean_weights)):
        key, query = weigh(pairs)
        carry = query[:, :, None] * key[:, None, :]
        torch.testing.assert_close(carry @ carry, carry)  # both project onto one direction
        carried[name] = (carry @ pairs @ carry.mT).diagonal(dim1=1, dim2=2).sum(1)
    assert (carried["principal"] >= carried["mean"]).all()


def test_the_sign_of_a_rotation_does_not_depend_on_the_solver() -> None:
    _, moment = keys_moment()
    pairs = rotary.head_moments(moment, list(range(WIDTH)), KV_HEADS)
    rows = rotary.rotations(pairs)
    assert (rows.gather(-1, rows.abs().argmax(-1, keepdim=True)) > 0).all()


def test_shared_key_rows_pick_and_weigh_the_kept_rows() -> None:
    keys, _ = keys_moment()
    weights = random(2, KV_HEADS, seed=8)
    rows, _ = rotary.pair_maps(weights, weights, [0, 2, 4, 6], WIDTH)
    split = keys.view(-1, KV_HEADS, WIDTH)
    expected = torch.stack([split[..., row] @ weights[index % 2] for index, row in enumerate((0, 2, 4, 6))], dim=1)
    torch.testing.assert_close(keys @ rows.T, expected)


def test_moments_of_an_affine_map_follow_from_those_of_its_input() -> None:
    x, weight, bias = random(500, 6) + 0.7, random(9, 6, seed=1), random(9, seed=2)
    y = x @ weight.T + bias
    moment, mean = latent.output_moment(weight, bias, second_moment(x), x.mean(0))
    torch.testing.assert_close(moment, second_moment(y))
    torch.testing.assert_close(mean, y.mean(0))


def test_full_rank_loses_nothing_under_any_weighting() -> None:
    moment = second_moment(random(300, 10) @ random(10, 10, seed=1))
    root, inverse = latent.symmetric_root(second_moment(random(300, 10, seed=2)))
    found = latent.low_rank(moment, 10, root, inverse)
    torch.testing.assert_close(found.decode @ found.encode, torch.eye(10, dtype=torch.float64), atol=1e-10, rtol=0)
    assert found.energy == pytest.approx(1)


def test_card_verification_8_energy_grows_with_rank_and_error_is_what_is_missing() -> None:
    data = random(400, 12) @ random(12, 12, seed=1)
    moment, energies = second_moment(data), []
    for rank in range(1, 13):
        found = latent.low_rank(moment, rank)
        lost = (data - data @ found.encode.T @ found.decode.T).pow(2).sum() / data.pow(2).sum()
        assert lost.item() == pytest.approx(1 - found.energy, abs=1e-12)
        energies.append(found.energy)
    assert energies == sorted(energies)


def test_no_other_projection_of_that_rank_does_better() -> None:
    moment = second_moment(random(400, 12) @ random(12, 12, seed=1))
    found = latent.low_rank(moment, 4)
    eye = torch.eye(12, dtype=torch.float64)

    def lost(projection: torch.Tensor) -> float:
        return ((eye - projection) @ moment @ (eye - projection).T).trace().item()

    best = lost(found.decode @ found.encode)
    for seed in range(5):
        basis, _ = torch.linalg.qr(random(12, 4, seed=seed))
        assert best < lost(basis @ basis.T)


def test_card_verification_8_repeating_heads_changes_neither_subspace_nor_energy() -> None:
    keys, values = random(16, 24), random(16, 24, seed=1)
    plain = torch.cat([keys, values])
    repeated = torch.cat([part.view(2, 8, 24).repeat_interleave(3, 0).flatten(0, 1) for part in (keys, values)])
    few, many = latent.low_rank(plain @ plain.T, 5), latent.low_rank(repeated @ repeated.T, 5)
    assert few.energy == pytest.approx(many.energy)
    again = (many.decode @ many.encode @ repeated).view(2, 2, 3, 8, 24)[:, :, 0].flatten(0, 2)
    torch.testing.assert_close(again, few.decode @ few.encode @ plain)


def test_weights_alone_give_the_singular_value_decomposition() -> None:
    weight = random(10, 24)
    moment, _ = latent.output_moment(weight, torch.zeros(10, dtype=torch.float64), None, None)
    found = latent.low_rank(moment, 3)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(found.decode @ found.encode @ weight, u[:, :3] * s[:3] @ vh[:3])
    assert found.energy == pytest.approx((s[:3].square().sum() / s.square().sum()).item())


def test_balance_is_the_ratio_of_mean_norms() -> None:
    moment = torch.diag(torch.tensor([16.0, 4.0, 1.0, 1.0, 4.0], dtype=torch.float64))
    assert latent.balance(moment, 2) == pytest.approx(3.0 / (4.0 / 3.0))
    assert latent.balance(moment, 0) == latent.balance(moment, 5) == 1.0


def test_balancing_keeps_values_from_starving() -> None:
    """Large keys take the whole rank of a plain decomposition (TransMLA section 4.3)."""
    keys, values = 30 * random(500, 8) @ random(8, 8, seed=1), random(500, 8, seed=2) @ random(8, 8, seed=3)
    moment = second_moment(torch.cat([keys, values], dim=1))
    alpha = latent.balance(moment, 8)
    scale = torch.diag(torch.cat([torch.full((8,), 1 / alpha), torch.ones(8)]).double())
    errors = {}
    for name, weighting in (("plain", None), ("balanced", scale)):
        found = latent.low_rank(moment, 8, weighting, None if weighting is None else torch.linalg.inv(weighting))
        missing = torch.eye(16, dtype=torch.float64) - found.decode @ found.encode
        errors[name] = ((missing @ moment @ missing.T).diagonal()[8:].sum() / moment.diagonal()[8:].sum()).item()
    assert errors["balanced"] < 0.5 * errors["plain"]
