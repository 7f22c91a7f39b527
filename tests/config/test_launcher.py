"""The launcher section: checked like the rest of a recipe, against the stages there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.cli.submit import command
from posttrain.config import load_recipe
from posttrain.config.launcher import Launcher, minutes
from posttrain.config.recipe import load_resolved
from posttrain.errors import RecipeError


@pytest.mark.parametrize(
    ("typed", "what", "fix"),
    [
        ("launcher.stages.distil.time=1:00:00", "no stage `distil`", "write distill instead of distil"),
        ("launcher.stages.distill.tme=1:00:00", "no key `tme`", "write launcher.stages.distill.time=1:00:00"),
        (
            "launcher.dependencies.distill.upcycl=afterany",
            "takes nothing from `upcycl`",
            "write upcycle instead of upcycl",
        ),
        (
            "launcher.dependencies.distill.evaluate=afterany",
            "takes nothing from `evaluate`",
            "the names are data, model, up",
        ),
        ("launcher.dependencies.distill.upcycle=after", "afterok", "write launcher.dependencies."),
        ("launcher.time=90", "no unit", ""),
        ("launcher.mem=lots", "launcher.mem", ""),
    ],
)
def test_mistakes_are_told_with_their_cure(typed: str, what: str, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("x_ecomla", ["scale=smoke", "launcher=slurm", typed])
    (problem,) = caught.value.problems
    assert what in problem.what and problem.where == typed and problem.fix.startswith(fix)


def test_settings_for_jobs_need_a_launcher_that_makes_some() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("x_ecomla", ["launcher.mem=4G"])
    (problem,) = caught.value.problems
    assert "no effect with launcher=local" in problem.what and problem.fix == "write launcher=slurm"


def test_what_single_stages_need_of_a_cluster_does_not_keep_a_recipe_from_a_laptop() -> None:
    typed = ["launcher.stages.distill.time=4:00:00", "launcher.dependencies.evaluate={prefer: afterany}"]
    assert load_recipe("x_ecomla", typed).frame.launcher.type == "local"


def test_a_stages_own_resources_replace_the_launchers(tmp_path: Path) -> None:
    typed = [
        "launcher=slurm_example",
        "launcher.stages.distill.time=1-00:00:00",
        "launcher.stages.distill.gpus_per_node=0",
    ]
    resolved = load_recipe("x_ecomla", typed)
    launcher = resolved.frame.launcher
    assert launcher.of("distill").time == "1-00:00:00" and launcher.of("evaluate").time == "12:00:00"
    assert launcher.of("distill").gpus_per_node == 0 and launcher.of("distill").partition == "gpu"
    frozen = tmp_path / "recipe.yaml"
    frozen.write_text(resolved.to_yaml())
    assert load_resolved(frozen).frame.launcher == launcher


@pytest.mark.parametrize(
    ("time", "expected"),
    [("30", 30), ("1:30", 1.5), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190), ("2-00:00:30", 2880.5)],
)
def test_times_are_read_as_slurm_reads_them(time: str, expected: float) -> None:
    assert minutes(time) == expected


OURS = ["--time=1:00:00", "--time 60", "-t 5", "-t5", "--nodes=2", "-N2", "-N 2-4", "--array=1-3", "-a 1-3", "-a1-3"]
OURS += ["--dependency=afterok:7", "-d singleton", "--error=x", "-e x", "-ex", "--output=x", "-o x", "-ofile"]
OURS += ["--ntasks=8", "-n 8", "-n8", "--ntasks-per-node=8", "--export=NONE", "--kill-on-invalid-dep=no"]
OURS += ["--requeue", "--no-requeue", "--signal=USR1@60", "--open-mode=truncate", "--parsable"]
SHORTENED = ["--outp=x", "--arr=1-3", "--depend=afterok:7", "--no-req"]
HIDDEN = ["--account=x --time=5", "-A x -t 5", "-HN2", "--exclusive '-ofile'"]


@pytest.mark.parametrize("line", [*OURS, *SHORTENED, *HIDDEN])
def test_options_that_posttrain_sets_are_refused_in_every_spelling(line: str) -> None:
    with pytest.raises(ValueError, match="is set by posttrain"):
        Launcher(type="slurm", extra=[line])


SITES_OWN = ["--exclusive", "--account=x", "-A x", "-Anode", "-p gpu", "-pgpu", "--nice=5", "--time-min=30", "-H"]
SITES_OWN += ["--nodelist=n1", "-w n1", "--exclude=n2", "-x n2", "--mail-type=END", "--comment='a, -t'", "-C a100"]
SITES_OWN += ["--ntasks-per-socket=1", "--export-file=x", "-s", "-L matlab@server", "--reservation=today"]


@pytest.mark.parametrize("line", SITES_OWN)
def test_other_options_of_sbatch_pass(line: str) -> None:
    assert Launcher(type="slurm", extra=[line]).extra == [line]


def test_a_line_whose_quotes_do_not_end_is_told() -> None:
    with pytest.raises(ValueError, match="cannot be read as options of sbatch: No closing quotation"):
        Launcher(type="slurm", extra=["--comment='mine"])


def test_submit_with_a_launcher_that_starts_no_jobs() -> None:
    with pytest.raises(RecipeError, match="launcher=local starts no jobs"):
        command("x_ecomla", ["scale=smoke", "launcher=local"])
