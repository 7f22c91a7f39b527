"""The stages hybrid_init, layer_select and assemble on small models."""

from __future__ import annotations

import json

import pytest
import torch
from hybrid_world import LAYERS, context, metas, sources, world  # noqa: F401
from source_models import make_source

from posttrain.config import registry
from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.methods.hybrid_ssm import SwapScorer, assemble, hybridize, is_feasible
from posttrain.models.architecture import cache_bytes, mixers, normalise
from posttrain.models.loading import load_model
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.stage import ArtifactMeta

INIT, SELECT, ASSEMBLE = (registry.stage(name) for name in ("hybrid_init", "layer_select", "assemble"))
DONORS = {"state": "state", "attention": "latent"}
SELECTING = {**DONORS, "teacher": "teacher", "data": "data"}
SMALL = {"tokens": 160, "sequence_length": 32, "micro_batch_size": 2}


@pytest.fixture(scope="module")
def models():
    return sources()


def init(**settings):
    return INIT.Config(**settings)


# ----- hybrid_init


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, []), ({"keep": [0, 4]}, [0, 4]), ({"keep_every": 2}, [1, 3, 5]), ({"keep_every": 4}, [3])],
)
def test_kept_layers_are_the_sources_and_the_prediction_is_the_model(context, models, settings, kept) -> None:  # noqa: F811
    ctx = context("hybrid_init", {"model": "teacher"}, **settings)
    folder = INIT.run(ctx)["model"]
    model = load_model(folder)
    assert [index for index, kind in enumerate(model.config.mixers) if kind == "full_attention"] == kept
    for index in kept:
        for name, tensor in models["teacher"].model.layers[index].state_dict().items():
            assert torch.equal(tensor, model.model.layers[index].state_dict()[name])
    predicted = INIT.describe(ctx.config, metas(models, model="teacher"))["model"]
    assert normalise(model.config.to_dict()) == predicted.architecture
    assert INIT.measure("model", folder, predicted).architecture == predicted.architecture


def test_kept_layers_may_come_from_a_conversion(context, models) -> None:  # noqa: F811
    ctx = context("hybrid_init", {"model": "teacher", "latent": "latent"}, keep=[2], conv_kernel=3)
    model = load_model(INIT.run(ctx)["model"])
    assert model.config.mixers[2] == "latent_attention" and model.config.mixers.count("mamba2") == LAYERS - 1
    for name, tensor in models["latent"].model.layers[2].state_dict().items():
        assert torch.equal(tensor, model.model.layers[2].state_dict()[name])
    predicted = INIT.describe(ctx.config, metas(models, model="teacher", latent="latent"))["model"]
    assert normalise(model.config.to_dict()) == predicted.architecture


def test_the_aligned_start_measures_the_text(context, models) -> None:  # noqa: F811
    settings = {"statistics_tokens": 64, "statistics_sequence_length": 16}
    ctx = context("hybrid_init", {"model": "teacher", "data": "data"}, init="aligned", **settings)
    model = load_model(INIT.run(ctx)["model"])
    assert ctx.result["statistics_tokens"] == 64 and all(
        0 < mean < 15 for mean in ctx.result["mean_attention_distance"]
    )
    predicted = INIT.describe(ctx.config, metas(models, model="teacher", data="data"))["model"]
    assert normalise(model.config.to_dict()) == predicted.architecture
    assert not model.config.mamba_norm and model.config.mamba_bias


def test_the_seed_decides_what_is_random(context) -> None:  # noqa: F811
    made = [
        load_model(INIT.run(context("hybrid_init", {"model": "teacher"}, work=f"w{index}", seed=seed))["model"])
        for index, seed in enumerate((1, 1, 2))
    ]
    weights = [model.model.layers[0].self_attn.in_proj.weight for model in made]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_hybrid_init_refuses(models) -> None:
    given = metas(models, model="teacher")
    for settings, what in (({"keep": [0, 9]}, "layer 9 is kept"), ({"init": "aligned"}, "no text is given")):
        with pytest.raises(RecipeError, match=what):
            INIT.check(init(**settings), given)
    with pytest.raises(RecipeError, match="it cannot become mamba2") as caught:
        INIT.check(init(), metas(models, model="latent"))
    assert "before its conversion" in caught.value.problems[0].fix
    with pytest.raises(ValueError, match="write keep_every=null to use keep"):
        init(keep=[1], keep_every=2)
    with pytest.raises(ValueError, match=r"keep=\[1,? 2\]"):
        init(keep=[2, 1])
    with pytest.raises(RecipeError, match="`latent` has 6 layers, the source 2"):
        INIT.check(init(), {**metas(models, latent="latent"), **metas({"a": make_source("llama")}, model="a")})


def test_too_little_text_for_the_aligned_start_says_so(context) -> None:  # noqa: F811
    ctx = context("hybrid_init", {"model": "teacher", "data": "data"}, init="aligned", statistics_sequence_length=9000)
    with pytest.raises(StageError, match="init=aligned needs at least 9000 tokens"):
        INIT.run(ctx)


# ----- assemble


@pytest.mark.parametrize("kept", [[], [0], [1, 5], list(range(LAYERS))])
@pytest.mark.parametrize("attention", ["latent", "teacher"])
def test_every_tensor_is_the_donors(models, kept, attention) -> None:
    hybrid = assemble(models["state"], models[attention], kept)
    for index, layer in enumerate(hybrid.model.layers):
        donor = models[attention if index in kept else "state"].model.layers[index].state_dict()
        assert layer.state_dict().keys() == donor.keys()
        assert all(torch.equal(tensor, donor[name]) for name, tensor in layer.state_dict().items())
    last = models[attention if LAYERS - 1 in kept else "state"]
    assert torch.equal(hybrid.model.norm.weight, last.model.norm.weight)
    assert torch.equal(hybrid.model.embed_tokens.weight, models["state"].model.embed_tokens.weight)
    assert hybrid.lm_head.weight.data_ptr() == hybrid.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_norms_of_other_families_come_along(family) -> None:
    models = sources(2, family)
    hybrid = assemble(models["state"], models["latent"], [1])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.isfinite(hybrid(ids).logits).all()
    assert normalise(hybrid.config.to_dict())["mixers"] == ["mamba2", "latent_attention"]


def test_assemble_by_a_selection_is_the_predicted_model(context, models, tmp_path) -> None:  # noqa: F811
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "selection.json").write_text(json.dumps({"kept": [0, 3], "layers": LAYERS}))
    ctx = context("assemble", {**DONORS, "selection": tmp_path / "chosen"})
    model = load_model(ASSEMBLE.run(ctx)["model"])
    assert mixers(normalise(model.config.to_dict())) == ["latent_attention", *["mamba2"] * 2] * 2
    given = {**metas(models, state="state", attention="latent")}
    known = ASSEMBLE.describe(ctx.config, {**given, "selection": ArtifactMeta("selection", extra={"kept": [0, 3]})})
    assert known["model"].architecture == normalise(model.config.to_dict()) and "open" not in known["model"].extra
    guessed = ArtifactMeta("selection", extra={"kept": [0, 1], "open": ["kept"]})
    assert ASSEMBLE.describe(ctx.config, {**given, "selection": guessed})["model"].extra["open"] == ["mixers"]
    (tmp_path / "chosen" / "selection.json").write_text("{}")
    with pytest.raises(StageError, match="no selection of layers"):
        ASSEMBLE.run(ctx)


def test_what_assemble_refuses(models) -> None:
    given = metas(models, state="state", attention="latent")
    with pytest.raises(RecipeError, match="neither is given"):
        ASSEMBLE.check(ASSEMBLE.Config(), given)
    chosen = {**given, "selection": ArtifactMeta("selection", extra={"kept": [0]})}
    with pytest.raises(RecipeError, match="both are given"):
        ASSEMBLE.check(ASSEMBLE.Config(keep=[0]), chosen)
    with pytest.raises(RecipeError, match="layer 6 is kept"):
        ASSEMBLE.check(ASSEMBLE.Config(keep=[6]), given)
    for roles, what in (
        ({"state": "latent", "attention": "latent"}, "`state` must have state-space layers everywhere"),
        ({"state": "state", "attention": "state"}, "`attention` must have attention everywhere"),
    ):
        with pytest.raises(RecipeError, match=what):
            ASSEMBLE.check(ASSEMBLE.Config(keep=[0]), metas(models, **roles))
    other = {"a": make_source("qwen2", num_hidden_layers=LAYERS)}
    with pytest.raises(RecipeError, match="not of one source: source_model_type llama and qwen2"):
        ASSEMBLE.check(ASSEMBLE.Config(keep=[0]), {**given, **metas(other, attention="a")})


# ----- layer_select


def naive(models, kept, batches) -> float:
    """KL(teacher ‖ hybrid) of the assembled model, nats a token, from whole logits in fp64."""
    hybrid = assemble(models["state"], models["latent"], sorted(kept)).double()
    teacher, total = models["teacher"].double(), 0.0
    with torch.no_grad():
        for ids in batches:
            ours, theirs = (model(ids).logits.log_softmax(-1) for model in (hybrid, teacher))
            total += float((theirs.exp() * (theirs - ours)).sum())
    models["teacher"].float()
    return total / sum(ids.numel() for ids in batches)


@pytest.mark.parametrize("kept", [(), (0, 4)])
def test_scores_are_divergences_of_assembled_hybrids(models, kept) -> None:
    ids = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(4))
    batches = ids.split(2)
    divergence, scores = SwapScorer(models["state"], models["latent"], models["teacher"], batches, False).scores(kept)
    assert divergence == pytest.approx(naive(models, kept, batches), rel=1e-4)
    for layer in range(LAYERS):
        expected = 0.0 if layer in kept else divergence - naive(models, {*kept, layer}, batches)
        assert scores[layer] == pytest.approx(expected, abs=2e-5)


def test_the_teacher_runs_once_whatever_is_measured(models) -> None:
    batches = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(4)).split(2)
    calls = []
    handle = models["teacher"].model.norm.register_forward_hook(lambda *_: calls.append(1))
    scorer = SwapScorer(models["state"], models["latent"], models["teacher"], batches, False)
    scorer.scores(())
    scorer.scores((1,))
    scorer.divergence([0])
    handle.remove()
    assert len(calls) == len(batches)


@pytest.mark.parametrize("method", ["smart", "uniform", "greedy_kl"])
def test_the_selection_is_what_the_divergences_say(context, models, method) -> None:  # noqa: F811
    ctx = context("layer_select", SELECTING, method=method, n_keep=2, **SMALL)
    folder = SELECT.run(ctx)["selection"]
    found = json.loads((folder / "selection.json").read_text())
    kept, rounds = found["kept"], found["rounds"]
    assert len(kept) == 2 and found["tokens"] == 160 and SELECT.measure("selection", folder, None).extra["kept"] == kept
    assert len(rounds) == {"smart": 1, "uniform": 0, "greedy_kl": 2}[method]
    if method == "greedy_kl":
        first = max(range(LAYERS), key=rounds[0]["scores"].__getitem__)
        assert rounds[1]["kept"] == [first] and first in kept
        assert rounds[1]["kl"] == pytest.approx(rounds[0]["kl"] - max(rounds[0]["scores"]), rel=1e-6)
        assert found["kl_kept"] == pytest.approx(rounds[1]["kl"] - max(rounds[1]["scores"]), rel=1e-6)
    if method == "smart":
        assert is_feasible(kept, LAYERS)
    if method == "uniform":
        assert kept == [0, 3]


def test_a_budget_is_kept_to_with_states_counted(context, models) -> None:  # noqa: F811
    ctx = context("layer_select", SELECTING, method="budget", cache_ratio=0.6, cache_tokens=256, **SMALL)
    found = json.loads((SELECT.run(ctx)["selection"] / "selection.json").read_text())
    hybrid = assemble(models["state"], models["latent"], found["kept"])
    whole = cache_bytes(normalise(models["teacher"].config.to_dict()), 256)
    assert cache_bytes(normalise(hybrid.config.to_dict()), 256) <= 0.6 * whole
    assert found["cache_ratio"] == pytest.approx(cache_bytes(normalise(hybrid.config.to_dict()), 256) / whole)
    given = metas(models, **SELECTING)
    with pytest.raises(RecipeError, match="the smallest hybrid takes"):
        SELECT.check(SELECT.Config(method="budget", cache_ratio=0.01, cache_tokens=256, sequence_length=32), given)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_an_interrupted_selection_goes_on_to_the_same(context, stop_at, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    settings = {"method": "greedy_kl", "n_keep": 2, **SMALL}
    whole = (SELECT.run(context("layer_select", SELECTING, **settings))["selection"] / "selection.json").read_text()
    ctx = context("layer_select", SELECTING, work="cut", **settings)
    asked = iter([False] * (stop_at - 1) + [True])
    with monkeypatch.context() as patch:
        patch.setattr(StageContext, "should_stop", lambda self: next(asked))
        with pytest.raises(StopRequested):
            SELECT.run(ctx)
    measured = []
    batch = SwapScorer._batch
    monkeypatch.setattr(SwapScorer, "_batch", lambda self, *args: measured.append(1) or batch(self, *args))
    again = SELECT.run(context("layer_select", SELECTING, work="cut", **settings))["selection"]
    assert (again / "selection.json").read_text() == whole
    assert len(measured) == 2 * 3 - stop_at  # two rounds of three batches, less what was measured


def test_the_plan_knows_how_many_but_not_which(models) -> None:
    given = metas(models, **SELECTING)
    meta = SELECT.describe(SELECT.Config(keep_fraction=0.5, **SMALL), given)["selection"]
    assert len(meta.extra["kept"]) == 3 and meta.extra["open"] == ["kept"]
    assert "open" not in SELECT.describe(SELECT.Config(method="uniform", n_keep=2), given)["selection"].extra
    with pytest.raises(RecipeError, match="9 layers are to stay attention, and the models have 6"):
        SELECT.check(SELECT.Config(n_keep=9, **SMALL), given)
    with pytest.raises(RecipeError, match="sequence_length 4096 exceeds"):
        SELECT.check(SELECT.Config(n_keep=2, sequence_length=4096), given)
    for settings in ({}, {"n_keep": 2, "keep_fraction": 0.5}, {"method": "budget", "n_keep": 2}, {"cache_ratio": 0.5}):
        with pytest.raises(ValueError, match="takes exactly one of"):
            SELECT.Config(**settings)


def test_a_hybrid_made_at_once_or_put_together_is_the_same(models) -> None:
    """Without alignment between, `assemble` of two conversions is `hybridize` of the source."""
    teacher = models["teacher"]
    state = hybridize(teacher, ["mamba2"] * LAYERS, {"seed": 5})
    at_once = hybridize(teacher, ["mamba2", "full_attention"] * 3, {"seed": 5})
    put_together = assemble(state, teacher, [1, 3, 5])
    assert at_once.state_dict().keys() == put_together.state_dict().keys()
    assert all(torch.equal(tensor, put_together.state_dict()[name]) for name, tensor in at_once.state_dict().items())
