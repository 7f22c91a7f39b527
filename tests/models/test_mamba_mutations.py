"""Verification 12 of the method card: faults found in released code and ports, each put in, are each seen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from source_models import make_source
from test_mamba_mixer import inputs, mixer, oracle

from posttrain.methods.hybrid_ssm import hybridize
from posttrain.methods.hybrid_ssm import init as init_module
from posttrain.models.upcycled import mamba_upcycled, norm_upcycled, ssd_upcycled


def mutated(module: ModuleType, before: str, after: str) -> ModuleType:
    """The module with one piece of its source replaced; the original stays."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(before) == 1, f"{before!r} is not once in {module.__file__}"
    name = f"{module.__name__}_mutated"
    spec = importlib.util.spec_from_loader(name, loader=None)
    changed = importlib.util.module_from_spec(spec)
    changed.__package__ = module.__package__
    sys.modules[name] = changed  # dataclasses look their module up
    try:
        exec(compile(source.replace(before, after), module.__file__, "exec"), changed.__dict__)
    finally:
        del sys.modules[name]
    return changed


def equal_to_equations(module: torch.nn.Module) -> bool:
    u = inputs()
    with torch.no_grad():
        expected = oracle(module, u)
        return torch.allclose(module(u).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


MIXER = {
    "decays without their exponential": ("a = -torch.exp(self.A_log)", "a = -self.A_log"),
    "decays of the other sign": ("a = -torch.exp(self.A_log)", "a = -torch.exp(-self.A_log)"),
    "step bias added twice": ("dt.to(at_least_fp32(dt)) + self.dt_bias", "dt.to(at_least_fp32(dt)) + 2 * self.dt_bias"),
    "rows in another order than z, x": ("self.in_proj(hidden_states)", "self.in_proj(hidden_states).roll(8, -1)"),
    "x and B exchanged": ("return (x, self.b_norm", "x, b = b, x\n        return (x, self.b_norm"),
    "no skip": ("a, b, c, self.D, initial_state", "a, b, c, None, initial_state"),
    "convolution not causal": (
        "nn.functional.pad(columns, (weight.shape[-1] - 1, 0))",
        "nn.functional.pad(columns, (weight.shape[-1] - 2, 1))",
    ),
    "no activation behind the convolution": ("nn.functional.silu(mixed) if", "mixed if"),
}
NORM = {
    "norm over all heads": ("gated.unflatten(-1, (-1, self.group_size))", "gated.unflatten(-1, (1, -1))"),
    "no gate": ("y.to(wide) * nn.functional.silu(z.to(wide))", "y.to(wide)"),
}


def test_nothing_changed_equals_the_equations() -> None:
    module = mixer()
    module.__class__ = mutated(mamba_upcycled, "class Mamba2(", "class Mamba2(").Mamba2
    assert equal_to_equations(module)


@pytest.mark.parametrize("fault", MIXER)
def test_a_fault_of_the_mixer_is_seen(fault: str) -> None:
    module = mixer()
    module.__class__ = mutated(mamba_upcycled, *MIXER[fault]).Mamba2
    assert not equal_to_equations(module)


@pytest.mark.parametrize("fault", NORM)
def test_a_fault_of_the_gated_norm_is_seen(fault: str) -> None:
    module = mixer()
    module.norm.__class__ = mutated(norm_upcycled, *NORM[fault]).UpcycledGatedRMSNorm
    assert not equal_to_equations(module)


@pytest.mark.parametrize(
    "fault",
    [
        ("repeat_interleave(heads // tensor.shape[2], dim=2)", "repeat(1, 1, heads // tensor.shape[2], 1)"),
        ("total[..., -1:] - total, total[..., -1]", "total[..., -1:] - total, total[..., -1] * 2"),
    ],
    ids=["heads of a group not neighbours", "state decays twice between chunks"],
)
def test_a_fault_of_the_scan_is_seen(fault: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    changed = mutated(ssd_upcycled, *fault)
    scan = lambda *args, **options: changed.chunked_scan(*args, **{"chunk": 8, **options})  # noqa: E731
    monkeypatch.setattr(mamba_upcycled, "ssd_scan", scan)
    assert not equal_to_equations(mixer())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch.cat([z, *weights, dt])", "torch.cat([weights[0], z, *weights[1:], dt])"),
        ("parts = [(v, 1.0), (k, 1.0), (q, scale)]", "parts = [(k, 1.0), (v, 1.0), (q, scale)]"),
    ],
    ids=["z and x exchanged", "keys for values"],
)
def test_a_fault_of_the_start_is_seen(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The aligned start computes attention with falling weights; with its rows elsewhere it does not."""
    from posttrain.methods.hybrid_ssm import HeadStatistics, convert

    # As many KV heads as query heads, so that rows of every kind have the same number and nothing else complains.
    source = make_source("llama", num_key_value_heads=4)
    statistics = HeadStatistics((torch.full((4,), 3.0, dtype=torch.float64),) * 2, tokens=1)
    right = hybridize(source, ["mamba2"] * 2, {"init": "aligned"}, statistics)
    changed = mutated(init_module, before, after)
    monkeypatch.setattr(convert, "init_from_attention", changed.init_from_attention)
    wrong = hybridize(source, ["mamba2"] * 2, {"init": "aligned"}, statistics)
    u = inputs()
    with torch.no_grad():
        one, other = (model.model.layers[0].self_attn(u) for model in (right, wrong))
        attention = source.model.layers[0].self_attn
        q, k, v = (
            part(u).unflatten(-1, (4, 16)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        back = torch.arange(u.shape[1])[:, None] - torch.arange(u.shape[1])
        weights = torch.where(back >= 0, 0.25 * 0.75 ** back.clamp(min=0), torch.zeros(()))
        mixed = ((q @ k.mT) * 16**-0.5 * weights) @ v
        expected = attention.o_proj(mixed.transpose(1, 2).flatten(2))
    assert torch.allclose(one, expected, atol=1e-4)
    assert not torch.allclose(other, expected, atol=1e-3)
