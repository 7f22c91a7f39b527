"""The loss of one layer, and blocks in two parts."""

from __future__ import annotations

import pytest
import torch
from source_models import FAMILIES, make_source

from posttrain.methods.layer_distillation import layer_loss
from posttrain.models.blocks import block_calls, block_outputs
from posttrain.models.upcycling import convert_full_attention


def pairs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 8, generator=generator, dtype=dtype) for _ in range(4)]


def test_against_numbers_by_hand() -> None:
    ones, zeros = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    # ‖(1, 1, 1, 1)‖ = 2 for each of 3 tokens, the mean of its squares 1.
    assert layer_loss((ones, zeros), (zeros, zeros), "l2") == 6
    assert layer_loss((ones, 3 * ones), (zeros, zeros), "l2") == 6 + 18
    assert layer_loss((ones, 3 * ones), (zeros, zeros), "mse") == 3 + 27


def test_l2_is_the_sum_of_norms_that_are_not_squared() -> None:
    mix, out, mix_t, out_t = pairs()
    expected = sum((a - b).square().sum(-1).sqrt().sum() for a, b in ((mix, mix_t), (out, out_t)))
    torch.testing.assert_close(layer_loss((mix, out), (mix_t, out_t)), expected)


@pytest.mark.parametrize("kind", ["l2", "mse"])
def test_no_difference_gives_no_loss_and_a_gradient_of_zero(kind: str) -> None:
    mix, out, *_ = pairs()
    mix.requires_grad_()
    loss = layer_loss((mix, out), (mix.detach(), out), kind)
    loss.backward()
    assert loss == 0 and torch.equal(mix.grad, torch.zeros_like(mix))


def test_half_precision_is_compared_in_fp32() -> None:
    near = torch.full((1, 1, 4), 1.0, dtype=torch.bfloat16)
    found = layer_loss((near, near), (near.float() + 1e-4, near.float()), "l2")
    assert found.dtype == torch.float32 and found == pytest.approx(2e-4, rel=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    mix, out, *_ = pairs()
    with pytest.raises(ValueError, match="not one of l2, mse"):
        layer_loss((mix, out), (mix, out), "l1")
    with pytest.raises(ValueError, match="do not match"):
        layer_loss((mix, out), (mix[:1], out))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("upcycled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_in_two_parts_are_the_model(family: str, upcycled: bool, packed: bool) -> None:
    model = make_source(family, num_hidden_layers=3)
    model = convert_full_attention(model) if upcycled else model
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2) if packed else None
    with torch.no_grad():
        extra = {} if positions is None else {"position_ids": positions}
        expected = model.model(input_ids=ids, use_cache=False, **extra).last_hidden_state
        calls = block_calls(model, ids, positions)
        hidden = calls.hidden
        for block, arguments in zip(model.model.layers, calls.arguments, strict=True):
            whole = block(hidden, **arguments)
            mixed, after = block_outputs(block, hidden, **arguments)
            assert torch.equal(after, whole)
            torch.testing.assert_close(
                after - block.mlp(block.post_attention_layernorm(hidden + mixed)), hidden + mixed
            )
            hidden = after
    assert torch.equal(model.model.norm(hidden), expected)
    assert all("forward" not in vars(block) for block in model.model.layers)
