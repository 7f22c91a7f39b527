"""Everything wrong with a recipe, at once, each with its origin and what to type instead."""

from __future__ import annotations

import os
from pathlib import Path

import hydra
import pytest
from pydantic import BaseModel

from posttrain.config import load_recipe
from posttrain.config.explain import in_section, type_words
from posttrain.config.suggest import among
from posttrain.config.validate import SECTIONS
from posttrain.data.config import DataSourceConfig
from posttrain.errors import Problem, RecipeError
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.pipeline.plan import make_plan


def problems(recipe: str, overrides: list[str], **places: Path) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides, **places)
    return caught.value.problems


def test_four_kinds_of_typos_are_told_together() -> None:
    typed = [
        "stages.distill.max_stesp=3",
        "stages.upcycle.kv_lora_rank=abc",
        "stages.evaluate.inputs.model=distil.model",
        "model=smolm2_135m",
    ]
    found = problems("x_ecomla", ["scale=smoke", *typed])
    assert [problem.where for problem in found] == typed
    assert [problem.fix for problem in found] == [
        "write stages.distill.max_steps=3",
        "write stages.upcycle.kv_lora_rank=N with N a whole number greater than 0",
        "write stages.evaluate.inputs.model=distill.model",
        "write model=smollm2_135m",
    ]
    assert "a whole number greater than 0, or null" in found[1].what and "Latent width" in found[1].what


@pytest.mark.parametrize(
    ("typed", "words", "fix"),
    [
        ("stages.distill.lr", "no `=`", "write stages.distill.lr=VALUE without spaces"),
        (
            "stages.distill.lr=1e-4,1e-5",
            "several values",
            "write 'stages.distill.lr=[1e-4,1e-5]' for a list, or -m for a run with each value",
        ),
        ("scale=smoke,demo", "several values", "give one value, or -m for a run with each"),
        ("model=tiny,llama32_1b", "several values", "give one value, or -m for a run with each"),
        ("description=a=(b", "cannot be read", "quote it: write 'description=\"a=(b\"'"),
        pytest.param(
            "stages.evaluate.prompts[0]=b",
            "cannot be read",
            "write stages.evaluate.prompts.0=b",
            marks=pytest.mark.skipif(not hydra.__version__.startswith("1.3"), reason="Hydra 1.4 reads it"),
        ),
        ("scale=smok", "no scale `smok`", "write scale=smoke"),
        ("scal=smoke", "no section `scal`", "write scale=smoke"),
        ("modle=tiny", "no section `modle`", "write model=tiny"),
        ("modle@models.t=tiny", "no group `modle`", "write model@models.t=tiny"),
        ("model@teacher=tiny", "where the model goes", "write model@models.teacher=tiny"),
        ("engine@x=cpu", "where the engine goes", "write engine=OPTION"),
        ("stage=distill", "where the stage goes", "write stage@stages.NAME=OPTION"),
        ("model=./m", "not among the options", "write model.path=./m to use a folder or file of your own"),
        (
            "data@datasets.d=a/b.jsonl",
            "not among",
            "write datasets.d.path=a/b.jsonl to use a folder or file of your own",
        ),
        ("tracker=wanbd", "none, wandb", "write tracker=wandb"),
        ("stage@stages.distill=distil", "mla_upcycle", "write stage@stages.distill=distill"),
        ("~stage@stages.distill", "without a type", "write ~stages.distill"),
        ("~stages.evalute", "nothing to delete", "write ~stages.evaluate"),
        ("~stages.distill.lr=5", "is not 5", "write ~stages.distill.lr"),
        ("distill.max_steps=3", "no section `distill`", "write stages.distill.max_steps=3"),
        ("distill=1", "no section `distill`", f"the sections are {among(SECTIONS)}"),
        (
            "~stages.upcycle",
            "`~stages.upcycle` removed it",
            "write stages.distill.inputs.student=model, or ~stages.distill",
        ),
        ("stages.distil.max_steps=3", "no stage `distil`", "write stages.distill.max_steps=3"),
        ("stages.distill=null", "a section", "write ~stages.distill to delete it"),
        ("stages.distill.lr.x=3", "a number greater than 0", "write stages.distill.lr=8e-05"),
        ("stages.distill.precision=fp23", "one of fp32, bf16", "write stages.distill.precision=fp32"),
        ("stages.distill.max_steps=0", "at least 1", "write stages.distill.max_steps=1000"),
        ("stages.evaluate.prompts.9=x", "a list of 4", None),
        ("seed=-1", "at least 0 and less than 4294967296", "write seed=0"),
        ("paths=3", "a section", "write paths.KEY=VALUE; the keys are outputs"),
        ("stages=3", "a section", "write stages.KEY=VALUE"),
        ("run.limit_hours=soon", "a number greater than 0", "write run.limit_hours=1.0"),
        ("engine.ranks=2", "works on one rank, not on 2", "write engine=ddp"),
        ("engine.ranks=0", "at least 1", "write engine.ranks=1"),
        ("hydra.run.dir=x", "Hydra itself", None),
        ("stages.distill._target_=os.system", "data and cannot name code", None),
        ("stages.distill.x={_target_: os.system}", "data and cannot name code", None),
        ("description=${oc.env:HOME}", "only plain references", None),
        ("description=${run.naem}", "run.naem", None),
        ("description=${description}", "description", None),
        ("run.name=???", "must be given", "write run.name=VALUE"),
        ("run.name=a/b", "text matching", None),
        (
            "stages.upcycle.inputs.calibration=data.trian",
            "no output 'trian'",
            "write stages.upcycle.inputs.calibration=data.train",
        ),
        ("stages.upcycle.inputs.modle=model", "no input 'modle'", None),
        ("stage@stages.model=evaluate", "names a source", None),
        (
            "stages.upcycle.kv_lora_rank=32",
            "exactly one",
            "write stages.upcycle.kv_ratio=null stages.upcycle.kv_lora_rank=32",
        ),
    ],
)
def test_one_mistake_one_remedy(typed: str, words: str, fix: str | None) -> None:
    known = ["stages.evaluate.prompts=[a,b,c,d]"] if "prompts" in typed else []
    found = problems("x_ecomla", [*known, typed])
    mine = [problem for problem in found if problem.where == typed]
    assert any(words in problem.what for problem in mine), found
    if fix is not None:
        assert fix in [problem.fix for problem in mine]
    assert not any("+" in problem.fix for problem in found), "Hydra's own hint teaches the wrong cure"


@pytest.mark.parametrize(
    ("typed", "words", "fix"),
    [
        (
            "stages.rl.rewards.correct.type=mat",
            "`stages.rl.rewards.correct.type` should be one of gym, math, code, regex, length, plugin, not 'mat'",
            "write stages.rl.rewards.correct.type=math",
        ),
        (
            "stages.rl.rewards={correct: gym}",
            "`stages.rl.rewards.correct` should be a section with `type`: one of gym, math",
            "write stages.rl.rewards.correct={type: gym}",
        ),
        (
            "stages.rl.rewards={brief: {target: 20, limit: 30}}",
            "`stages.rl.rewards.brief.type` is missing: one of gym, math",
            "write stages.rl.rewards.brief.type=gym|math|code|regex|length|plugin",
        ),
        (
            "stages.rl.rewards={brief: {type: length, target: few, limit: 30}}",
            "`stages.rl.rewards.brief.target` should be a whole number at least 0, not 'few' (Longest completion",
            "write stages.rl.rewards.brief.target=N with N a whole number at least 0",
        ),
        (
            "stages.rl.rewards={brief: {type: length, target: 8, limit: 30, wieght: 1}}",
            "`stages.rl.rewards.brief` has no key `wieght`",
            "write weight instead of wieght",
        ),
        (
            "stages.rl.rewards={brief: {type: length, target: 8, limit: 30, zzz: 1}}",
            "`stages.rl.rewards.brief` has no key `zzz`",
            "the keys are limit, target, type, weight; `posttrain show grpo` explains them",
        ),
        ("stages.rl.rewards={brief: {type: length, target: 30, limit: 8}}", "stages.rl.rewards.brief: `limit` (8)", ""),
    ],
)
def test_a_mistake_in_one_of_several_kinds_of_section(typed: str, words: str, fix: str) -> None:
    (problem,) = problems("grpo", ["scale=smoke", typed])
    assert words in problem.what and (problem.where, problem.fix) == (typed, fix)


def test_a_typed_setting_that_a_path_overrules_is_an_error(tmp_path: Path) -> None:
    typed = ["data.heldout=committed", "data.samples.num_samples=5", "data.inputs.model=model", "model.label=x"]
    paths = ["data.path=./my.jsonl", "model.path=./m", "model.dtype=null", "data.heldout_fraction=0.2"]
    found = problems("x_ecomla", [*typed, *paths])
    assert {problem.where for problem in found} == set(typed) and len(found) == len(typed)
    assert found[0].fix == "remove it, or leave out data.path"
    assert "`model.path` excludes it" in found[-1].what
    load_recipe("x_ecomla", ["data=demo_text", "model=tiny", *paths])
    load_recipe("x_ecomla", typed[:1])
    scale = "scales: {mine: [model.label=y]}"
    (tmp_path / "mine.yaml").write_text(f"defaults: [x_ecomla, _self_]\n{scale}\n")
    load_recipe("./mine.yaml", ["scale=mine", "model.path=./m"], cwd=tmp_path)


def test_files_need_no_model_that_writes() -> None:
    assert load_recipe("x_ecomla", ["data=teacher_samples"]).stages["data"].inputs == {"model": "model"}
    assert load_recipe("x_ecomla", ["data=teacher_samples", "data.path=./my.jsonl"]).stages["data"].inputs == {}


def test_an_incomplete_architecture_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "part.yaml").write_text("hub: a/b\narchitecture:\n  model_type: llama\n  vocab_size: 300\n")
    with pytest.raises(RecipeError) as caught:
        make_plan(load_recipe("transmla", ["model=part"], config_dir=tmp_path, cwd=tmp_path))
    (problem,) = caught.value.problems
    assert problem.where == "model/part.yaml:2" and "hidden_size" in problem.what


def test_a_stage_may_have_any_name() -> None:
    stage = ["stage@stages.convert=mla_upcycle", "stages.convert.inputs={model: model}"]
    (budget,) = problems("x_ecomla", [*stage, "stages.convert.kv_ratio=0.5", "stages.convert.kv_lora_rank=32"])
    assert budget.fix == "write stages.convert.kv_ratio=null stages.convert.kv_lora_rank=32"
    typed = "stages.convert.qk_rope_head_dim=7"
    recipe = load_recipe("transmla", [*stage, "stages.convert.kv_ratio=0.5", typed])
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe)
    (width,) = caught.value.problems
    assert width.where == typed and "stages.convert.qk_rope_head_dim=" in width.fix


@pytest.mark.parametrize(
    ("fix", "shown"),
    [
        ("kv_ratio=0.3 or more", "stages.a.kv_ratio=0.3 or more"),
        ("inputs.calibration=data.train, or objective=weight", "stages.a.inputs.calibration=data.train, or stages.a."),
        (
            "model.path=FOLDER, engine.ranks=1, --rank_multiple=2",
            "model.path=FOLDER, engine.ranks=1, --rank_multiple=2",
        ),
        ("stages.other.kv_ratio=1 ~objective=2 lower kv_ratio", "stages.other.kv_ratio=1 ~objective=2 lower kv_ratio"),
    ],
)
def test_settings_in_a_stages_advice_can_be_typed(fix: str, shown: str) -> None:
    problem = in_section(Problem("wrong", "inputs.model", fix), MlaUpcycleConfig, "stages.a")
    assert problem.fix.startswith(shown) and problem.where == "stages.a.inputs.model"
    assert in_section(Problem("wrong", "some place"), MlaUpcycleConfig, "stages.a").where == "some place"
    deleted = in_section(
        Problem("wrong", fix="kv_ratio=0.5, or `~inputs.calibration`, not ~stages.b"), MlaUpcycleConfig, "stages.a"
    )
    assert deleted.fix == "stages.a.kv_ratio=0.5, or `~stages.a.inputs.calibration`, not ~stages.b"


def test_a_further_source_is_named_as_the_recipe_has_it(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.jsonl"
    typed = [f"datasets.more.path={missing}", "stages.train.inputs.data=datasets.more.train"]
    recipe = load_recipe("transmla", ["scale=smoke", "+data@datasets.more=tiny", *typed])
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe)
    assert [problem.where for problem in caught.value.problems] == [f"datasets.more.path={missing}"]
    problem = Problem("data.path is empty", "data.path=x", "data.heldout_path=FILE, or a data.frame")
    named = in_section(problem, DataSourceConfig, "datasets.more")
    assert named.what == "datasets.more.path is empty" and named.where == "datasets.more.path=x"
    assert named.fix == "datasets.more.heldout_path=FILE, or a data.frame"
    assert in_section(problem, DataSourceConfig, "data") == problem


def test_a_refused_target_is_told_once() -> None:
    assert len(problems("x_ecomla", ["stages.distill._target_=os.system"])) == 1


def test_no_resolver_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "told")
    found = problems("x_ecomla", ["description='${oc.env:SECRET}'", "run.name='${oc.create:${oc.env:SECRET}}'"])
    assert len(found) == 2 and "told" not in str(found)


YAML = """# mistakes
defaults:
  - base
  - model: smolm2_135m
  - data: demo_text
  - stage@stages.upcycle: mla_upcycle
  - stage@stages.distill: distil
  - _self_
sede: 3
stages:
  upcycle:
    inputs: {model: model, calibration: data.trian}
    kv_lora_rank: abc
  husk: {inputs: {}}
  distill:
    inputs: {student: upcycle.model, teacher: model, data: data.train}
    max_stesp: 3
    _target_: os.system
    lr: ${sed}
  other: {type: evalute}
scales:
  smoke:
    - model=tinny
    - stages.distill.max_steps=x
  bad: 3
"""


def test_the_same_in_a_file_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(YAML)
    found = {problem.where: problem for problem in problems("./mine.yaml", ["scale=smoke"], cwd=tmp_path)}
    expected = {
        "mine.yaml:4": "write model: smollm2_135m",
        "mine.yaml:7": "write stage@stages.distill: distill",
        "mine.yaml:9": "write seed instead of sede",
        "mine.yaml:12": "write calibration: data.train",
        "mine.yaml:13": "write kv_lora_rank: N with N a whole number greater than 0",
        "mine.yaml:14": "choose one with stage@stages.husk=TYPE, or delete the stage with ~stages.husk",
        "mine.yaml:17": "write max_steps instead of max_stesp",
        "mine.yaml:18": None,
        "mine.yaml:19": None,
        "mine.yaml:20": "write type: evaluate",
        "mine.yaml:23 (model=tinny)": "write model=tiny",
        "mine.yaml:24 (stages.distill.max_steps=x)": "write stages.distill.max_steps=1000",
        "mine.yaml:25": None,
    }
    assert set(found) == set(expected)
    for where, fix in expected.items():
        assert fix is None or found[where].fix == fix


def test_a_mistake_in_an_option_names_the_options_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("# mine\nbuilder: tiny\nmax_row: 3\n")
    found = problems("x_ecomla", ["data=mine"], config_dir=tmp_path, cwd=tmp_path)
    assert [(problem.where, problem.fix) for problem in found] == [
        ("data/mine.yaml:3", "write max_rows instead of max_row")
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("defaults: base\n", 1, "should be a list"),
        ("defaults:\n  - base\n  - model: [tiny, tiny]\n", 3, "group: option"),
        ("defaults:\n  - base\n  - model: ${oc.env:HOME}\n", 3, "may not be computed"),
        ("defaults:\n  - bas\n", 2, "not among what a defaults list can name"),
        ("defaults:\n  - base\n  - modle: tiny\n", 3, "no group `modle`"),
        ("defaults:\n  - base\n  - optional model: tinny\n", 3, "not among the options of model"),
        ("stages: [a]\n", 1, "a section"),
        ("stages: {a.b: {type: evaluate}}\n", 1, "cannot be a name"),
        ("stages: {a: {type: model_source}}\n", 1, "unknown type `model_source`"),
        ("a: [1\n", 2, "not valid YAML"),
        ("defaults: [mine]\n", 1, "not among what a defaults list can name"),
        ("- 1\n", None, "keys and values"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    found = problems("./mine.yaml", [], cwd=tmp_path)
    where = f"mine.yaml:{line}" if line else "mine.yaml"
    assert any(problem.where == where and words in problem.what for problem in found), found


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: [b]\n")
    (tmp_path / "b.yaml").write_text("defaults: [c]\n")
    (tmp_path / "c.yaml").write_text("defaults: [b]\n")
    assert "include each other" in problems("./a.yaml", [], cwd=tmp_path)[0].what


@pytest.mark.parametrize(
    ("recipe", "words", "fix"),
    [
        ("x_ecolma", "no recipe `x_ecolma`", "write x_ecomla"),
        ("./x_ecomla.yaml", "no recipe file", "write x_ecomla for the shipped recipe"),
        ("./mone.yaml", "no recipe file", "write ./mine.yaml"),
        ("mine", "no recipe `mine`", "write ./mine.yaml for the file in this folder"),
        ("old.yml", "should end in .yaml", "rename it to old.yaml"),
        ("model=tiny", "where the recipe should", None),
    ],
)
def test_a_recipe_that_is_not_there(tmp_path: Path, recipe: str, words: str, fix: str | None) -> None:
    (tmp_path / "mine.yaml").write_text("# mine\n")
    (tmp_path / "old.yml").write_text("# old\n")
    (problem,) = problems(recipe, [], cwd=tmp_path)
    assert words in problem.what
    assert fix is None or problem.fix == fix


def test_a_config_dir_that_is_not_there(tmp_path: Path) -> None:
    assert "no folder" in problems("x_ecomla", [], config_dir=tmp_path / "absent")[0].what


def test_nothing_is_written_by_a_refused_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problems("x_ecomla", ["model=smolm2_135m"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("entries", "line", "words", "fix"),
    [
        (["/recipes/x_ecomla", "override /model: tiny"], 2, "included by its name", "write x_ecomla"),
        (["x_ecomla", "override /modell: tiny"], 3, "no part of the recipe has `modell`", "write override model: tiny"),
        (["x_ecomla", "model: tiny"], 3, "`model` is chosen twice", "write override model: tiny"),
        (["override model: tiny", "x_ecomla"], 2, "stands before", "move it to the end of the list"),
    ],
)
def test_a_recipe_that_inherits_another_is_told_how(
    tmp_path: Path, entries: list[str], line: int, words: str, fix: str
) -> None:
    (tmp_path / "mine.yaml").write_text("".join(["defaults:\n", *(f"  - {entry}\n" for entry in entries)]))
    (found,) = problems("./mine.yaml", ["scale=smoke"], cwd=tmp_path)
    assert found.where == f"mine.yaml:{line}"
    assert words in found.what and found.fix.startswith(fix)


def test_a_recipe_in_a_folder_of_ones_own_includes_a_shipped_one_by_name(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("defaults:\n  - /recipes/x_ecomla\n  - override /model: tiny\n")
    assert problems("mine", [], config_dir=tmp_path)[0].fix == "write x_ecomla"
    (tmp_path / "recipes" / "mine.yaml").write_text("defaults:\n  - x_ecomla\n  - override /model: tiny\n")
    assert load_recipe("mine", config_dir=tmp_path).stages["model"].name == "tiny random model"


@pytest.mark.parametrize(
    ("typed", "blamed"),
    [
        (["stages.rl.generation_batch_size=4", "stages.rl.num_generations=2"], "stages.rl.num_generations=2"),
        (["stages.rl.generation_batch_size=4"], "stages.rl.generation_batch_size=4"),
        (["stages.rl={risk: {bundle_size: 3}}"], "stages.rl={risk: {bundle_size: 3}}"),
    ],
)
def test_a_rule_of_a_whole_stage_is_told_of_a_setting_that_it_names(typed: list[str], blamed: str) -> None:
    """Not of the last override, whichever it was: how answers are found is no reason for a number of questions."""
    (found,) = problems("riskpo", ["scale=smoke", *typed, "stages.rl.answer.find=boxed"])
    assert "bundles" in found.what and found.where == blamed


def test_a_rule_that_names_no_override_is_told_of_the_stage(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - riskpo\nstages:\n  rl:\n    risk: {bundle_size: 7}\n    generation_batch_size: 510\n"
    )
    (found,) = problems("./mine.yaml", ["stages.rl.answer.find=boxed"], cwd=tmp_path)
    assert "bundles of 7" in found.what and found.where == "mine.yaml:4"


def test_alternatives_that_read_alike_are_said_once():
    class One(BaseModel):
        pass

    class Other(BaseModel):
        pass

    assert type_words(One | Other) == "a section of keys and values"
    assert type_words(One | int | Other | None) == "a section of keys and values or a whole number or null"
