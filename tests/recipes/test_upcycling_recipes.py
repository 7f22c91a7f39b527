"""The recipes `x_ecomla` and `transmla`: their stages, the papers' settings, what each scale keeps of them."""

from __future__ import annotations

import pytest

from posttrain.config import load_recipe, registry
from posttrain.data import tasks
from posttrain.data.sections import GymTasks
from posttrain.errors import RecipeError
from posttrain.pipeline.graph import Graph
from posttrain.pipeline.plan import make_plan

ORDERS = {
    "x_ecomla": [
        "model",
        "data",
        "upcycle",
        "evaluate_converted",
        "distill",
        "datasets.pairs",
        "prefer",
        "evaluate",
    ],
    "transmla": ["model", "data", "upcycle", "evaluate_converted", "train", "evaluate"],
}
SCALES = ["smoke", "demo", "gpu1"]


def stages(recipe: str, *overrides: str) -> dict:
    return load_recipe(recipe, list(overrides)).stages


def order(recipe: str, *overrides: str) -> list[str]:
    found = stages(recipe, *overrides)
    return list(Graph({name: (registry.stage(config.type), config) for name, config in found.items()}).order)


@pytest.mark.parametrize("scale", [None, *SCALES])
@pytest.mark.parametrize("recipe", ORDERS)
def test_every_scale_is_planned_with_the_same_stages(recipe, scale, tmp_path):
    overrides = [f"paths.outputs={tmp_path}", *([f"scale={scale}"] if scale else [])]
    plan = make_plan(load_recipe(recipe, overrides))
    assert [stage.name for stage in plan.stages] == ORDERS[recipe]
    assert all(stage.status == "pending" for stage in plan.stages)


@pytest.mark.parametrize("recipe", ORDERS)
def test_results_are_compared_with_the_source(recipe):
    trained = {"x_ecomla": "prefer", "transmla": "train"}[recipe]
    found = stages(recipe)
    assert found["evaluate"].inputs == {"model": f"{trained}.model", "baseline": "model", "data": "data.heldout"}
    assert found["evaluate_converted"].inputs == {**found["evaluate"].inputs, "model": "upcycle.model"}


@pytest.mark.parametrize("scale", [None, *SCALES])
def test_pairs_hold_the_distilled_models_own_mistakes_and_judge_on_others(scale):
    found = stages("x_ecomla", *([f"scale={scale}"] if scale else []))
    assert found["datasets.pairs"].inputs == {"model": "distill.model"}
    prefer = found["prefer"]
    assert prefer.inputs == {
        "model": "distill.model",
        "data": "datasets.pairs.train",
        "gate_data": "datasets.pairs.heldout",
        "gate_text": "data.heldout",
    }
    assert (prefer.keep, prefer.loss_type) == ("better", "sigmoid")


def test_preference_defaults_are_the_papers_and_one_epoch():
    found = stages("x_ecomla")
    prefer, pairs = found["prefer"], found["datasets.pairs"]
    assert (prefer.lr, prefer.beta, prefer.lr_scheduler, prefer.warmup_ratio) == (5e-7, 0.01, "cosine", 0.1)
    assert (prefer.sequence_length, prefer.pairs_per_step) == (1024, 32)
    epochs = prefer.max_steps * prefer.pairs_per_step / (pairs.gym.size * (1 - pairs.heldout_fraction))
    assert 0.95 < epochs <= 1


def test_transmla_defaults_are_the_papers():
    found = stages("transmla")
    train, upcycle = found["train"], found["upcycle"]
    assert train.max_steps * train.tokens_per_step / 1e9 == pytest.approx(6.0, rel=0.01)
    assert (train.sequence_length, train.sequences_per_step, train.loss_on) == (4096, 64, "all")
    assert (train.lr, train.lr_scheduler, train.warmup_ratio, train.weight_decay) == (2e-5, "cosine", 0.03, 0.01)
    assert (upcycle.rotary_plan, upcycle.freqfold, upcycle.latent_kind) == ("rorope", "search", "bkv")


def test_transmla_has_the_published_size_on_llama_3_8b():
    recipe = load_recipe("transmla", ["model=llama31_8b"])
    notes = next(stage for stage in make_plan(recipe).stages if stage.name == "upcycle").estimate.notes
    assert any("KV cache 512 + 64 of 2048 elements" in note for note in notes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", ORDERS)
def test_a_scale_keeps_what_makes_the_method(recipe, scale):
    full, scaled = stages(recipe), stages(recipe, f"scale={scale}")
    fields = {
        "upcycle": ("kv_ratio", "preset", "rotary_plan", "freqfold", "latent_plan", "objective"),
        "distill": ("divergence", "temperature", "ce_weight", "lr_scheduler", "trainable", "lora"),
        "prefer": ("loss_type", "keep", "gate_metric", "gate_max_perplexity_increase"),
        "train": ("loss_on", "packing", "weight_decay", "lr_scheduler", "trainable", "lora"),
    }
    for name in fields.keys() & full.keys():
        for field in fields[name]:
            assert getattr(scaled[name], field) == getattr(full[name], field), (name, field)


def test_preference_can_be_left_out_with_one_change_of_a_reference():
    found = order("x_ecomla", "scale=smoke", "~stages.prefer", "stages.evaluate.inputs.model=distill.model")
    assert found == [name for name in ORDERS["x_ecomla"] if name not in ("datasets.pairs", "prefer")]


def test_pairs_of_ones_own_need_no_model(tmp_path):
    rows = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "d", "chosen": "e", "rejected": "f"}\n'
    (tmp_path / "pairs.jsonl").write_text(rows)
    found = order("x_ecomla", "scale=demo", f"datasets.pairs.path={tmp_path / 'pairs.jsonl'}")
    assert found.index("datasets.pairs") < found.index("upcycle")


@pytest.mark.parametrize(
    ("recipe", "override", "what", "fix"),
    [
        ("x_ecomla", "datasets.pairs.inputs.model=distil.model", "names no stage", "inputs.model=distill.model"),
        ("x_ecomla", "datasets.pairs.inputs.modle=model", "has no input 'modle'", "datasets.pairs.inputs.model"),
        ("x_ecomla", "datasets.pairs.inputs.model=data.train", "is a dataset", "upcycle.model|distill.model"),
        ("x_ecomla", "datasets.pairs.inputs.model=prefer.model", "wait for each other", "earlier stage"),
        ("x_ecomla", "datasets.pairs.gym.sizes=4", "no key `sizes`", "datasets.pairs.gym.size=4"),
        ("x_ecomla", "stages.prefer.inputs.gate_data=datasets.pairs.train", "is the training data", "data.heldout"),
        ("x_ecomla", "stages.prefer.lr_sheduler=linear", "no key `lr_sheduler`", "stages.prefer.lr_scheduler"),
        ("transmla", "stages.upcycle.rotary_plan=paired", "preset=transmla is rotary_plan=rorope", "leave one of them"),
        ("transmla", "stages.trian.lr=1e-4", "no stage `trian`", "stages.train.lr"),
        ("transmla", "stages.train.tokens_per_step=100", "must be a multiple of sequence_length", "tokens_per_step=96"),
    ],
)
def test_a_wrong_override_is_one_message_with_a_remedy(recipe, override, what, fix, tmp_path):
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe(recipe, ["scale=smoke", f"paths.outputs={tmp_path}", override]))
    (problem,) = caught.value.problems
    assert what in problem.what
    assert fix in f"{problem.what} {problem.fix}"


def test_a_deleted_stage_names_the_source_that_needs_it():
    with pytest.raises(RecipeError) as caught:
        stages("x_ecomla", "scale=smoke", "~stages.distill")
    by_consumer = [problem.what for problem in caught.value.problems]
    assert [("datasets.pairs" in what, "prefer" in what) for what in by_consumer] == [(True, False), (False, True)]
    assert all("`~stages.distill` removed it" in what for what in by_consumer)
    assert stages("x_ecomla", "scale=smoke", "~stages.distill", "~stages.prefer", "~stages.evaluate")


@pytest.mark.parametrize(
    ("recipe", "deleted", "fix"),
    [
        ("x_ecomla", "~stages.prefer", "write stages.evaluate.inputs.model=distill.model, or ~stages.evaluate"),
        ("zebra_llama", "~stages.align_latent", "write stages.select.inputs.attention=latent.model, or ~stages.select"),
        ("compose_all", "~stages.distill", "write stages.teach.inputs.model=assemble.model, or ~stages.teach"),
    ],
)
def test_instead_of_a_deleted_stages_result_what_it_took_is_advised(recipe, deleted, fix):
    with pytest.raises(RecipeError) as caught:
        stages(recipe, "scale=smoke", deleted)
    assert fix in [problem.fix for problem in caught.value.problems]


def test_what_a_plan_takes_for_granted_of_the_default_tasks_is_so():
    default = GymTasks().model_dump_json()
    assert tasks._typical_bytes(default) == tasks.EASY_BYTES
    assert tasks._refused(default, "data") == ()
