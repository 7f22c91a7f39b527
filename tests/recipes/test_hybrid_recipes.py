"""The recipes `zebra_llama`, `mamba_in_llama`, `compose_all`: their stages, the papers' settings, what scales keep."""

from __future__ import annotations

import pytest

from posttrain.config import load_recipe
from posttrain.errors import RecipeError
from posttrain.models.architecture import cache_bytes_per_token, mixers
from posttrain.pipeline.plan import Plan, make_plan

SCALES = [None, "smoke", "demo", "gpu1"]
ORDERS = {
    "zebra_llama": [
        "model",
        "data",
        "latent",
        "align_latent",
        "state",
        "align_state",
        "select",
        "assemble",
        "evaluate_assembled",
        "distill",
        "datasets.pairs",
        "prefer",
        "evaluate",
    ],
    "mamba_in_llama": [
        "model",
        "data",
        "hybrid",
        "evaluate_converted",
        "distill",
        "datasets.pairs",
        "prefer",
        "evaluate",
    ],
    "compose_all": [
        "model",
        "data",
        "datasets.problems",
        "latent",
        "align_latent",
        "state",
        "align_state",
        "select",
        "assemble",
        "distill",
        "teach",
        "evaluate_taught",
        "rl",
        "evaluate",
    ],
}


def plan(recipe: str, folder, *overrides: str) -> Plan:
    return make_plan(load_recipe(recipe, [f"paths.outputs={folder}", *overrides]))


def stages(recipe: str, *overrides: str) -> dict:
    return load_recipe(recipe, list(overrides)).stages


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", ORDERS)
def test_every_scale_is_planned_with_the_same_stages(recipe, scale, tmp_path) -> None:
    found = plan(recipe, tmp_path, *([f"scale={scale}"] if scale else []))
    assert [stage.name for stage in found.stages] == ORDERS[recipe]
    assert all(stage.status == "pending" for stage in found.stages)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", ["zebra_llama", "compose_all"])
def test_both_branches_start_from_the_source_and_meet_in_the_hybrid(recipe, scale) -> None:
    found = stages(recipe, *([f"scale={scale}"] if scale else []))
    donors = {"state": "align_state.model", "attention": "align_latent.model"}
    assert found["state"].inputs["model"] == found["latent"].inputs["model"] == "model"
    assert found["select"].inputs == {**donors, "teacher": "model", "data": "data.train"}
    assert found["assemble"].inputs == {**donors, "selection": "select.selection"}
    assert found["distill"].inputs == {"student": "assemble.model", "teacher": "model", "data": "data.train"}
    for name, student in (("align_state", "state.model"), ("align_latent", "latent.model")):
        assert found[name].inputs == {"student": student, "teacher": "model", "data": "data.train"}


def test_zebra_llama_on_the_papers_model_is_the_papers(tmp_path) -> None:
    found = plan("zebra_llama", tmp_path, "model=llama32_1b")
    hybrid = found["assemble"].outputs["model"].architecture
    assert mixers(hybrid).count("latent_attention") == 4 and mixers(hybrid).count("mamba2") == 12
    assert (hybrid["kv_lora_rank"], hybrid["qk_rope_head_dim"]) == (128, 32)
    assert cache_bytes_per_token(hybrid) == 1280
    notes = [note for stage in found.stages for note in stage.estimate.notes]
    assert any("16 hybrids are measured on 1,048,576 tokens each" in note for note in notes)


def test_zebra_llamas_defaults_are_the_papers() -> None:
    found = stages("zebra_llama")
    for name in ("align_latent", "align_state"):
        ild = found[name]
        assert ild.max_steps * ild.tokens_per_step / 1e9 == pytest.approx(1.36, rel=0.01)
        assert (ild.sequence_length, ild.sequences_per_step, ild.lr) == (2048, 96, 2e-4)
        assert (ild.loss, ild.trainable, ild.lr_scheduler, ild.warmup_ratio) == ("l2", "block", "cosine", 0.01)
    distill = found["distill"]
    assert distill.max_steps * distill.tokens_per_step / 1e9 == pytest.approx(5.4, rel=0.01)
    assert (distill.lr, distill.reduction, distill.temperature, distill.ce_weight) == (8e-5, "batch_sum", 1.0, 0.0)
    assert (found["select"].method, found["select"].keep_fraction) == ("smart", 0.25)
    assert (found["state"].init, found["state"].conv_kernel, found["state"].kept(16)) == ("published", 4, [])
    prefer = found["prefer"]
    assert (prefer.lr, prefer.beta, prefer.warmup_ratio, prefer.sequence_length) == (5e-7, 0.01, 0.1, 1024)


def test_mamba_in_llama_keeps_every_other_layer_as_it_is(tmp_path) -> None:
    found = plan("mamba_in_llama", tmp_path, "model=llama32_3b")
    assert mixers(found["hybrid"].outputs["model"].architecture) == ["mamba2", "full_attention"] * 14
    quarter = plan("mamba_in_llama", tmp_path, "model=llama32_3b", "stages.hybrid.keep_every=4")
    assert mixers(quarter["hybrid"].outputs["model"].architecture) == [*["mamba2"] * 3, "full_attention"] * 7
    distill = stages("mamba_in_llama")["distill"]
    assert distill.max_steps * distill.tokens_per_step / 1e9 == pytest.approx(20, rel=0.01)
    assert (distill.lr, distill.trainable) == (2e-5, "mixers")


@pytest.mark.parametrize("scale", ["smoke", "demo", "gpu1"])
@pytest.mark.parametrize("recipe", ORDERS)
def test_a_scale_keeps_what_makes_the_method(recipe, scale) -> None:
    full, scaled = stages(recipe), stages(recipe, f"scale={scale}")
    fields = {
        "latent": ("preset", "rotary_plan", "latent_plan", "objective"),
        "state": ("init", "conv_kernel", "repeat_before_conv", "keep"),
        "hybrid": ("init", "keep_every", "conv_kernel"),
        "align_state": ("loss", "trainable"),
        "align_latent": ("loss", "trainable"),
        "select": ("method", "n_keep", "cache_ratio"),
        "distill": ("divergence", "temperature", "ce_weight", "lr_scheduler", "lora"),
        "prefer": ("loss_type", "keep", "gate_metric"),
        "rl": ("preset", "risk"),
    }
    for name in fields.keys() & full.keys():
        for field in fields[name]:
            assert getattr(scaled[name], field) == getattr(full[name], field), (name, field)


@pytest.mark.parametrize(
    ("recipe", "override", "what", "fix"),
    [
        ("zebra_llama", "stages.select.method=smrat", "smart", "stages.select.method=smart"),
        ("zebra_llama", "stages.select.n_keep=3", "exactly one of n_keep, keep_fraction", ""),
        (
            "zebra_llama",
            "stages.select.inputs.state=align_latent.model",
            "state-space layers everywhere",
            "keeps no layer",
        ),
        ("zebra_llama", "stages.assemble.keep=[0]", "both are given", "inputs.selection"),
        ("zebra_llama", "stages.align_state.inputs.teacher=data.train", "is a dataset", "model"),
        ("mamba_in_llama", "stages.hybrid.keep=[1]", "both choose", "keep_every=null"),
        ("compose_all", "stages.rl.inputs.data=data.train", "", ""),
    ],
)
def test_a_wrong_override_is_refused_with_a_remedy(recipe, override, what, fix, tmp_path) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(recipe, tmp_path, "scale=smoke", override)
    said = [f"{problem.what} {problem.fix}" for problem in caught.value.problems]
    assert any(what in one and fix in one for one in said), said


def test_the_selection_can_be_left_out_for_layers_of_ones_own(tmp_path) -> None:
    words = ["scale=smoke", "~stages.select", "~stages.assemble.inputs.selection", "stages.assemble.keep=[1]"]
    found = plan("zebra_llama", tmp_path, *words)
    assert mixers(found["assemble"].outputs["model"].architecture) == ["mamba2", "latent_attention"]
