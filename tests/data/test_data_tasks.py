"""Generated tasks: the same for a seed, apart for two splits."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from posttrain.data import tasks
from posttrain.data.config import DataSourceConfig
from posttrain.data.reading import read_card, read_rows
from posttrain.data.sections import EASY_TASKS, GymTasks
from posttrain.data.stage import DataSource
from posttrain.data.tasks import HELDOUT_SEEDS, SEEDS_PER_RUN, draw, problem_of
from posttrain.errors import RecipeError, StageError
from posttrain.pipeline.context import StageContext

STAGE = DataSource()
SUMS = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def config(**fields) -> DataSourceConfig:
    return DataSourceConfig(**{"builder": "reasoning_gym", "gym": {"size": 60}, "heldout_fraction": 0.2, **fields})


def run(cfg: DataSourceConfig, work, seed: int = 0):
    work.mkdir()
    ctx = StageContext("data", cfg, work, seed=seed)
    outputs = STAGE.run(ctx)
    return read_rows(outputs["train"]), read_rows(outputs["heldout"]), ctx


def test_conversations_with_the_right_answer(tmp_path) -> None:
    cfg = config()
    train, heldout, ctx = run(cfg, tmp_path / "w")
    assert (len(train), len(heldout)) == (48, 12)
    assert {row["task"]["name"] for row in train} == set(EASY_TASKS)
    for row in train[:12]:
        entry = problem_of(row["task"])
        assert row["messages"] == [
            {"role": "user", "content": entry["question"].strip()},
            {"role": "assistant", "content": entry["answer"]},
        ]
        assert tasks.generator_of(row["task"]).score_answer(row["messages"][1]["content"], entry) == 1.0
    predicted = STAGE.describe(cfg, {})["train"]
    measured = STAGE.measure("train", tmp_path / "w" / "outputs" / "train", predicted)
    assert predicted.rows == measured.rows == 48 and predicted.extra["rows"] == measured.extra["rows"] == "messages"
    assert 0.7 < predicted.tokens / measured.tokens < 1.4
    card = read_card(tmp_path / "w" / "outputs" / "train")
    assert card["external"] == {"reasoning_gym": tasks.package_version()} and "Apache" in card["licence"]


def test_the_seed_of_the_run_decides_and_seeds_do_not_share_problems(tmp_path) -> None:
    cfg = config(gym={"size": 40, "tasks": {"basic_arithmetic": {}}})
    found = [run(cfg, tmp_path / str(number), seed) for number, seed in enumerate((0, 0, 1))]
    assert found[0][:2] == found[1][:2]
    questions = [{row["messages"][0]["content"] for row in [*train, *held]} for train, held, _ in found]
    # A generator of seed 1 would share all but one problem with one of seed 0, were the run's seed handed on as it is.
    assert len(questions[0] & questions[2]) <= 2
    assert STAGE.uses_seed(cfg) and not STAGE.uses_seed(DataSourceConfig(builder="tiny"))


def test_seeds_of_the_splits_cannot_meet_and_no_question_comes_twice() -> None:
    """Sums of two digits: hardly more than a hundred of them, so that other seeds draw the same questions."""
    problems = draw(GymTasks(tasks=SUMS, size=150), 0.3, seed=2)
    train, heldout = ([problem.question for problem in part] for part in (problems.train, problems.heldout))
    assert len(heldout) == 45 and len(set(train + heldout)) == len(train) + len(heldout)
    assert problems.duplicates > 20
    for part, first in ((problems.train, 0), (problems.heldout, HELDOUT_SEEDS)):
        seeds = [problem.task["seed"] + problem.task["index"] - 2 * SEEDS_PER_RUN for problem in part]
        assert min(seeds) >= first and max(seeds) < first + HELDOUT_SEEDS


def test_a_generator_that_repeats_itself_gives_fewer() -> None:
    problems = draw(GymTasks(tasks=SUMS, size=3000), 0.1, seed=0)
    assert 100 < len(problems.train) + len(problems.heldout) <= 200  # ten by ten, plus and minus
    assert len(problems.heldout) == pytest.approx(0.1 * (len(problems.train) + len(problems.heldout)), abs=1)


def test_held_out_text_from_elsewhere(tmp_path) -> None:
    train, heldout, _ = run(config(heldout="committed"), tmp_path / "w")
    assert len(train) == 60 and len(heldout) == 37


@pytest.mark.parametrize(
    ("gym", "message", "fix"),
    [
        ({"chain_sums": {}}, "no task 'chain_sums'", "did you mean chain_sum?"),
        ({"chain_sum": {"min_terms": 9}}, "refuses its settings: max_terms must be", "min_digits"),
        ({"chain_sum": {"terms": 9}}, "unexpected keyword argument 'terms'", "max_terms"),
        ({"chain_sum": {}, "gcds": {}, "lcms": {}}, "no task 'gcds'", "gcd?"),
    ],
)
def test_wrong_tasks_stop_the_plan(gym, message, fix) -> None:
    for ask in (STAGE.describe, STAGE.check, STAGE.estimate):
        with pytest.raises(RecipeError) as error:
            ask(config(gym={"tasks": gym}), {})
        assert message in str(error.value) and fix in str(error.value)
    assert len(error.value.problems) == (2 if "lcms" in gym else 1)


def test_no_tasks_at_all_are_refused() -> None:
    with pytest.raises(ValidationError, match="gym.tasks"):
        config(gym={"tasks": {}})


def test_without_the_package_the_plan_names_it(monkeypatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    for ask in (STAGE.describe, STAGE.check):
        with pytest.raises(RecipeError, match=r"(?s)reasoning_gym is not installed.*pip install reasoning-gym"):
            ask(config(), {})
    with pytest.raises(RecipeError, match="not installed"):
        STAGE.external(config())


def test_the_package_is_a_dependency() -> None:
    import tomllib
    from pathlib import Path

    root = Path(__file__).parents[2]
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(line.startswith("reasoning-gym") for line in needed)
    assert f"reasoning_gym=={tasks.package_version()}" in (root / "constraints.txt").read_text()


def test_errors_at_run_time_are_stage_errors(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(StageError, match="not installed"):
        run(config(), tmp_path / "w")


def test_only_leaves_the_other_tasks_out_and_says_what_it_does_not_find():
    chosen = GymTasks(tasks={"chain_sum": {"max_digits": 1}, "gcd": {}}, only=["chain_sum"])
    assert chosen.tasks == {"chain_sum": {"max_digits": 1}}
    assert {problem.task["name"] for problem in draw(GymTasks(only=["gcd"], size=8), 0.0, 0).train} == {"gcd"}
    with pytest.raises(ValueError, match="`only` names lcm, and the tasks are chain_sum, gcd"):
        GymTasks(tasks={"chain_sum": {}, "gcd": {}}, only=["lcm"])
