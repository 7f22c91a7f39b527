"""Hybrids from attention: where each row goes, what both starts compute, what is kept, what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from source_models import FAMILIES, make_source

from posttrain.errors import RecipeError
from posttrain.methods.hybrid_ssm import HeadStatistics, collect_head_statistics, hybridize
from posttrain.methods.hybrid_ssm.init import AttentionStats, decays_from_distance, init_from_attention
from posttrain.models.loading import load_model, save_model

H, G, D_H, INNER = 4, 2, 16, 64
ROWS = (64, 32, 32, 64, 4)  # z, x, B, C, dt
MIXED = ["mamba2", "full_attention"]


def ids(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def mixer(model, layer: int = 0):
    return model.model.layers[layer].self_attn


@pytest.mark.parametrize("family", FAMILIES)
def test_published_start(family: str) -> None:
    source = make_source(family)
    hybrid = hybridize(source, MIXED)
    ours, theirs = mixer(hybrid).requires_grad_(False), mixer(source)
    z, x, b, c, dt = ours.in_proj.weight.split(ROWS)
    assert torch.equal(x, theirs.v_proj.weight) and torch.equal(b, theirs.k_proj.weight)
    assert torch.equal(c, theirs.q_proj.weight) and torch.equal(ours.out_proj.weight, theirs.o_proj.weight)
    assert 0.1 < z.abs().max() <= 64**-0.5 and 0.1 < dt.abs().max() <= 64**-0.5 and abs(float(z.mean())) < 0.01
    assert 0.4 < ours.conv1d.weight.abs().max() <= 0.5 and ours.conv1d.bias.unique().numel() > 100
    assert 0 <= ours.A_log.min() and ours.A_log.exp().max() <= 16 and torch.equal(ours.D, torch.ones(H))
    steps = torch.nn.functional.softplus(ours.dt_bias)
    assert 1e-3 <= steps.min() and steps.max() <= 0.1 and torch.equal(ours.norm.weight, torch.ones(INNER))
    if family == "qwen2":
        zero_z, x, b, c, zero_dt = ours.in_proj.bias.split(ROWS)
        assert not zero_z.any() and not zero_dt.any()
        assert all(map(torch.equal, (x, b, c), (theirs.v_proj.bias, theirs.k_proj.bias, theirs.q_proj.bias)))
    if family == "qwen3":
        assert torch.equal(ours.b_norm.weight, theirs.k_norm.weight)
        assert torch.equal(ours.c_norm.weight, theirs.q_norm.weight)
    kept = {name: tensor for name, tensor in hybrid.state_dict().items() if ".layers.0.self_attn." not in name}
    assert kept and all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in kept.items())
    assert torch.isfinite(hybrid(ids()).logits).all()


def test_random_parts_belong_to_layer_and_seed() -> None:
    source = make_source()
    one, both, other = (
        hybridize(source, kinds, {"seed": seed})
        for kinds, seed in ((["full_attention", "mamba2"], 0), (["mamba2"] * 2, 0), (["mamba2"] * 2, 1))
    )
    for name, tensor in mixer(one, 1).state_dict().items():
        assert torch.equal(tensor, mixer(both, 1).state_dict()[name]), name
    assert not torch.equal(mixer(both).in_proj.weight, mixer(other).in_proj.weight)
    assert not torch.equal(mixer(both).A_log, mixer(both, 1).A_log)


@pytest.mark.parametrize("family", FAMILIES)
def test_aligned_start_is_attention_with_falling_weights(family: str) -> None:
    """Σ_s (1 − a) aˢ (q_t·k_{t−s}) / √d_h v_{t−s} of the source's own projections, without rotation and softmax."""
    source = make_source(family)
    distance = torch.tensor([0.3, 2.0, 9.0, 200.0], dtype=torch.float64)
    hybrid = hybridize(source, MIXED, {"init": "aligned"}, HeadStatistics((distance, None), 1))
    theirs, u = mixer(source), torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        q, k, v = (getattr(theirs, f"{name}_proj")(u).unflatten(-1, (-1, D_H)) for name in "qkv")
        if family == "qwen3":
            q, k = theirs.q_norm(q), theirs.k_norm(k)
        q, k, v = (part.transpose(1, 2).double() for part in (q, k, v))
        k, v = (part.repeat_interleave(H // G, 1) for part in (k, v))
        a = distance / (1 + distance)
        back = torch.arange(40)[:, None] - torch.arange(40)
        weights = torch.where(back >= 0, (1 - a[:, None, None]) * a[:, None, None] ** back.clamp(min=0), 0)
        mixed = (weights * (q @ k.mT) / math.sqrt(D_H)) @ v
        expected = theirs.o_proj(mixed.transpose(1, 2).flatten(2).float())
        assert torch.allclose(mixer(hybrid)(u), expected, atol=1e-4)
    assert expected.abs().max() > 0.1


def test_decays_have_the_mean_distance_of_their_head() -> None:
    distance = torch.tensor([0.5, 3.0, 60.0], dtype=torch.float64)
    decay = decays_from_distance(distance)
    back = torch.arange(10_000, dtype=torch.float64)
    for a, wanted in zip(decay, distance, strict=True):
        weights = (1 - a) * a**back
        assert abs(weights.sum() - 1) < 1e-9 and abs((weights * back).sum() - wanted) < 1e-6
    ends = decays_from_distance(torch.tensor([0.0, 1e12]))
    assert 0 < ends[0] < ends[1] < 1, "a head without distance, or with all of it, must stay finite"


def test_distances_are_those_of_the_sources_attention() -> None:
    source, batches = make_source(attn_implementation="sdpa"), [ids(2, 24), ids(1, 10, seed=1)]
    found = collect_head_statistics(source, iter(batches))
    assert found.tokens == 58 and source.config._attn_implementation == "sdpa"
    eager, total = make_source(), torch.zeros(2, H, dtype=torch.float64)
    for batch in batches:
        with torch.no_grad():
            maps = eager(batch, output_attentions=True).attentions
        length = batch.shape[1]
        back = torch.arange(length)[:, None] - torch.arange(length)
        total += torch.stack([(layer.double() * back).sum(dim=(0, 2, 3)) for layer in maps])
    assert torch.allclose(torch.stack(found.distance), total / 58, rtol=1e-5)
    upcycled = hybridize(source, MIXED)
    later = collect_head_statistics(upcycled, batches)
    assert later.distance[0] is None and later.distance[1].shape == (H,)
    with pytest.raises(ValueError, match="at least one"):
        collect_head_statistics(source, [])


def test_aligned_from_text_takes_its_distances() -> None:
    source = make_source()
    hybrid = hybridize(source, ["mamba2"] * 2, {"init": "aligned"}, statistics=[ids(4, 32)])
    assert hybrid.config.mamba_bias and not hybrid.config.mamba_norm and not hybrid.config.mamba_conv_activation
    assert torch.isfinite(hybrid(ids()).logits).all()
    decay = torch.exp(-torch.exp(mixer(hybrid).A_log) * torch.nn.functional.softplus(mixer(hybrid).dt_bias))
    measured = collect_head_statistics(source, [ids(4, 32)])
    assert torch.allclose(decay.double(), decays_from_distance(measured.distance[0]))


def test_latent_layers_come_from_a_conversion() -> None:
    from posttrain.methods.mla_upcycling import upcycle

    source = make_source(num_hidden_layers=3)
    latent, _ = upcycle(source, {"kv_lora_rank": 16})
    with torch.no_grad():
        for layer in latent.model.layers:
            layer.mlp.gate_proj.weight.mul_(2)  # as alignment would: a layer comes with the MLP it was aligned with
    kinds = ["latent_attention", "mamba2", "full_attention"]
    hybrid = hybridize(source, kinds, latent_from=latent)
    assert hybrid.config.mixers == kinds
    for name, tensor in mixer(latent).state_dict().items():
        assert torch.equal(mixer(hybrid).state_dict()[name], tensor)
    assert torch.equal(mixer(hybrid, 1).in_proj.weight[-4 - 64 : -4], mixer(source, 1).q_proj.weight)
    for index, donor in enumerate((latent, source, source)):
        ours, theirs = hybrid.model.layers[index].mlp.gate_proj.weight, donor.model.layers[index].mlp.gate_proj.weight
        assert torch.equal(ours, theirs)
    assert torch.isfinite(hybrid(ids()).logits).all()
    # A latent model keeps its latent layers, but has no queries, keys and values to make a state of.
    again = hybridize(hybrid, ["latent_attention", "mamba2", "mamba2"])
    assert torch.equal(mixer(again, 1).A_log, mixer(hybrid, 1).A_log)
    with pytest.raises(RecipeError, match="layer 0 is latent_attention: it cannot become mamba2"):
        hybridize(hybrid, ["mamba2"] * 3)


def test_dtype_and_round_trip(tmp_path) -> None:
    hybrid = hybridize(make_source("qwen3").bfloat16(), MIXED, {"repeat_before_conv": True, "conv_kernel": 3})
    assert hybrid.dtype == torch.bfloat16 and mixer(hybrid).A_log.dtype == torch.float32
    assert mixer(hybrid).conv1d.weight.shape == (3 * INNER, 1, 3)
    save_model(hybrid, None, tmp_path)
    again = load_model(tmp_path, dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, hybrid(ids()).logits)


@pytest.mark.parametrize(
    ("kinds", "config", "words"),
    [
        (["mamba2"], {}, "1 layer types for 2 layers"),
        (["mamba2", "gdn"], {}, "gdn"),
        (["latent_attention", "mamba2"], {}, "cannot become latent_attention"),
        (MIXED, {"init": "aligned"}, "mean attention distance"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_made_is_refused(kinds: list[str], config: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        hybridize(make_source(), kinds, config)


def test_layers_of_two_forms_are_refused() -> None:
    first = hybridize(make_source(), MIXED)
    with pytest.raises(RecipeError, match="another form"):
        hybridize(first, ["mamba2"] * 2, {"conv_kernel": 3})
    with pytest.raises(Exception, match="forget"):
        hybridize(make_source(), MIXED, {"forget": 1})


def test_the_contract_names_what_it_lacks() -> None:
    attention = mixer(make_source("qwen2"))
    stats = AttentionStats(H, G, D_H)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    with pytest.raises(ValueError, match="biases"):
        init_from_attention(*projections, stats)
    attention = mixer(make_source())
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    with pytest.raises(ValueError, match="distance"):
        init_from_attention(*projections, stats, init="aligned")
    with pytest.raises(ValueError, match="'best' is not one of"):
        init_from_attention(*projections, stats, init="best")


def test_selecting_and_configuring_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from posttrain.methods.hybrid_ssm import HybridConfig, select_layers\n"
        "select_layers([1.0, 2.0], 1)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
