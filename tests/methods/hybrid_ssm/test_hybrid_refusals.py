"""What could go wrong without a word: models that do not belong together, rounding, sums of another batch size."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hybrid_world import LAYERS, context, metas, sources, world  # noqa: F401
from source_models import make_source

from posttrain.config import registry
from posttrain.errors import RecipeError, StopRequested
from posttrain.methods.hybrid_ssm import assemble, hybridize
from posttrain.models.architecture import cache_bytes, normalise
from posttrain.pipeline.context import StageContext

INIT, SELECT, ASSEMBLE = (registry.stage(name) for name in ("hybrid_init", "layer_select", "assemble"))
DONORS = {"state": "state", "attention": "latent"}
SELECTING = {**DONORS, "teacher": "teacher", "data": "data"}
SMALL = {"tokens": 160, "sequence_length": 32}


@pytest.fixture(scope="module")
def models():
    return sources()


# ----- layer_select


@pytest.mark.parametrize(("first", "then", "stop_at"), [(4, 1, 1), (1, 4, 3)])
def test_another_batch_size_after_a_stop_changes_nothing(context, monkeypatch, first, then, stop_at) -> None:  # noqa: F811
    settings = {"n_keep": 2, **SMALL}
    whole = SELECT.run(context("layer_select", SELECTING, micro_batch_size=then, **settings))["selection"]
    asked = iter([False] * (stop_at - 1) + [True])
    with monkeypatch.context() as patch:
        patch.setattr(StageContext, "should_stop", lambda self: next(asked))
        with pytest.raises(StopRequested):
            SELECT.run(context("layer_select", SELECTING, work="cut", micro_batch_size=first, **settings))
    again = SELECT.run(context("layer_select", SELECTING, work="cut", micro_batch_size=then, **settings))["selection"]
    assert (again / "selection.json").read_text() == (whole / "selection.json").read_text()


@pytest.mark.parametrize("kernel", [4, 16])
def test_a_budget_holds_for_states_that_repeat_before_their_convolution(models, kernel) -> None:
    form = {"repeat_before_conv": True, "conv_kernel": kernel}
    state = normalise(hybridize(models["teacher"], ["mamba2"] * LAYERS, form).config.to_dict())
    given = metas(models, **SELECTING)
    given["state"] = replace(given["state"], architecture=state)
    donors, fitted = {name: given[name] for name in DONORS}, 0
    for tokens, share in itertools.product((64, 128, 256), range(10, 100, 2)):
        config = SELECT.Config(method="budget", cache_ratio=share / 100, cache_tokens=tokens, **SMALL)
        try:
            kept = SELECT.describe(config, given)["selection"].extra["kept"]
        except RecipeError as error:
            assert "the smallest hybrid takes" in str(error)
            continue
        fitted += 1
        arch = ASSEMBLE.describe(ASSEMBLE.Config(keep=kept), donors)["model"].architecture
        assert cache_bytes(arch, tokens) <= share / 100 * cache_bytes(given["teacher"].architecture, tokens)
    assert fitted > 10


def test_models_of_other_tokenizers_and_empty_data_are_refused(models) -> None:
    given, config = metas(models, **SELECTING), SELECT.Config(n_keep=2, **SMALL)
    with pytest.raises(RecipeError, match="different tokenizers"):
        SELECT.check(config, {**given, "teacher": replace(given["teacher"], tokenizer="another")})
    with pytest.raises(RecipeError, match="no rows"):
        SELECT.check(config, {**given, "data": replace(given["data"], rows=0)})
    with pytest.raises(ValueError, match="less than one sequence_length"):
        SELECT.Config(n_keep=2, tokens=16, sequence_length=32)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"method": "budget", "cache_ratio": 0.1, "keep_fraction": 0.25}, "write keep_fraction=null"),
        ({"method": "smart", "cache_ratio": 0.1, "keep_fraction": 0.25}, "write cache_ratio=null"),
        ({"method": "smart", "n_keep": 2, "keep_fraction": 0.25}, "write n_keep=null"),
        ({"method": "smart"}, "write n_keep=…"),
    ],
)
def test_the_advice_of_a_choice_too_many_is_what_helps(settings, fix) -> None:
    with pytest.raises(ValueError, match=fix):
        SELECT.Config(**settings)


# ----- hybrid_init


def test_a_conversion_that_does_not_belong_to_the_source_is_refused(models) -> None:
    given = metas(models, model="teacher", latent="latent")
    INIT.check(INIT.Config(keep=[2]), given)
    for change, what in (
        ({"architecture": {**given["latent"].architecture, "head_dim": 32}}, "head_dim"),
        ({"tokenizer": "another"}, "different tokenizers"),
        ({"architecture": normalise(models["state"].config.to_dict())}, "`latent` has a state-space layer there"),
    ):
        with pytest.raises(RecipeError, match=what):
            INIT.check(INIT.Config(keep=[2]), {**given, "latent": replace(given["latent"], **change)})


def test_latent_layers_of_two_forms_are_refused_instead_of_left_empty(models) -> None:
    """The source's own latent layer stays in the form of its model, which a donor of another rank would change."""
    from posttrain.methods.mla_upcycling import upcycle

    teacher = models["teacher"]
    donor = upcycle(teacher, {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})[0]
    mixed = hybridize(teacher, ["latent_attention"] + ["full_attention"] * (LAYERS - 1), latent_from=models["latent"])
    kinds = ["latent_attention", "latent_attention"] + ["mamba2"] * (LAYERS - 2)
    with pytest.raises(RecipeError, match="differ in kv_lora_rank"):
        hybridize(mixed, kinds, latent_from=donor)
    given = metas({"mixed": mixed, "donor": donor}, model="mixed", latent="donor")
    with pytest.raises(RecipeError, match="differ in kv_lora_rank"):
        INIT.check(INIT.Config(keep=[0, 1]), given)
    same = hybridize(mixed, kinds, latent_from=models["latent"])
    assert not any(parameter.isnan().any() for parameter in same.parameters())


def test_a_second_conversion_in_another_form_is_refused_before_it_runs(models) -> None:
    half = hybridize(models["teacher"], ["mamba2", "full_attention"] * 3)
    given = metas({"half": half}, model="half")
    INIT.check(INIT.Config(), given)
    with pytest.raises(RecipeError, match="another form"):
        INIT.check(INIT.Config(conv_kernel=2), given)


def test_nothing_to_convert_and_too_long_sequences_are_refused(models) -> None:
    given = metas(models, model="teacher", data="data")
    for settings in ({"keep_every": 1}, {"keep": list(range(LAYERS))}):
        with pytest.raises(RecipeError, match="none becomes a state-space layer"):
            INIT.check(INIT.Config(**settings), given)
    longest = given["model"].architecture["max_position_embeddings"]
    long = {"statistics_sequence_length": longest + 1, "statistics_tokens": 10 * longest}
    with pytest.raises(RecipeError, match=f"exceeds the model's {longest} positions"):
        INIT.check(INIT.Config(init="aligned", **long), given)
    with pytest.raises(ValueError, match="less than one statistics_sequence_length"):
        INIT.Config(init="aligned", statistics_tokens=100)


# ----- assemble


def test_no_donor_is_rounded(models) -> None:
    state = hybridize(models["teacher"], ["mamba2"] * LAYERS).bfloat16()
    hybrid = assemble(state, models["latent"], [1])
    assert hybrid.dtype == torch.float32
    for index, donor in ((0, state), (1, models["latent"])):
        for name, tensor in donor.model.layers[index].state_dict().items():
            assert torch.equal(hybrid.model.layers[index].state_dict()[name], tensor.float())
    given = metas(models, **DONORS)
    typed = {
        name: replace(given[name], extra={"dtype": kind})
        for name, kind in (("state", "bfloat16"), ("attention", "float32"))
    }
    assert ASSEMBLE.describe(ASSEMBLE.Config(keep=[1]), typed)["model"].extra["dtype"] == "float32"
    same = {name: replace(meta, extra={"dtype": "bfloat16"}) for name, meta in given.items()}
    assert ASSEMBLE.describe(ASSEMBLE.Config(keep=[1]), same)["model"].extra["dtype"] == "bfloat16"


def test_models_of_two_sources_are_refused(models, context) -> None:  # noqa: F811
    from posttrain.methods.mla_upcycling import upcycle

    stranger = make_source("llama", seed=9, num_hidden_layers=LAYERS, initializer_range=0.1)
    other = upcycle(stranger, {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})[0]
    with pytest.raises(RecipeError, match="embeddings differ by"):
        assemble(models["state"], other, [1])
    ctx = context("assemble", DONORS, keep=[1])
    ASSEMBLE.run(ctx)
    assert ctx.result["embeddings_differ_by"] == 0


def test_a_selection_of_other_layers_and_a_list_out_of_order_are_refused(models) -> None:
    from posttrain.methods.hybrid_ssm.selection import selection_meta

    given = metas(models, **DONORS)
    ASSEMBLE.check(ASSEMBLE.Config(), {**given, "selection": selection_meta([0], LAYERS)})
    with pytest.raises(RecipeError, match="made for 2 layers"):
        ASSEMBLE.check(ASSEMBLE.Config(), {**given, "selection": selection_meta([0], 2)})
    with pytest.raises(ValueError, match=r"keep=\[0, 3\]"):
        ASSEMBLE.Config(keep=[3, 0, 0])


# ----- training


def test_weight_decay_leaves_decays_and_skips_alone(models) -> None:
    from posttrain.training.trainer import StageTrainer

    names = StageTrainer.get_decay_parameter_names(object.__new__(StageTrainer), models["state"])
    last = {name.rpartition(".")[2] for name in names}
    assert not last & {"A_log", "D", "dt_bias"} and any(name.endswith("in_proj.weight") for name in names)


def test_few_long_documents_are_read_further(world) -> None:  # noqa: F811
    from text_data import write_dataset

    from posttrain.models.tiny import tiny_tokenizer
    from posttrain.training.blocks import sample_blocks

    folder = world / "one_long"
    write_dataset(folder, ["word " * 4000])
    said = {"purpose": "p", "where": "w", "setting": "s"}
    assert sample_blocks(folder, tiny_tokenizer(), 1024, 32, 0, **said).shape == (32, 32)
