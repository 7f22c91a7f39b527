"""`posttrain chat`: which model is meant, and the program that takes over."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from posttrain.cli import chat
from posttrain.errors import RecipeError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests" / "report"))
    try:
        from fabricated_run import complete_run
    finally:
        sys.path.pop(0)
    complete_run(tmp_path / "outputs")
    return tmp_path / "outputs"


def test_a_run_means_its_newest_model(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = (outputs / "runs").iterdir()
    for name in (run.name, run.name[:4], str(run)):
        folder = chat.model_folder(name, outputs)
        assert folder.name == "model" and folder.parent.parent.name == "distill"
        assert f"stage distill of run {run.name}" in capsys.readouterr().err


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert chat.model_folder(str(tmp_path), Path("outputs")) == tmp_path


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no config.json"):
        chat.model_folder(str(tmp_path), tmp_path)
    with pytest.raises(RecipeError, match="there is no run 'nothing'"):
        chat.model_folder("nothing", tmp_path)


def test_the_settings_reach_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    called = []
    monkeypatch.setattr(os, "execve", lambda *arguments: called.append(arguments))
    chat.command(str(tmp_path), prompt="--odd", max_new_tokens=3, temperature=0.5, top_p=0.8, seed=4, outputs=tmp_path)
    ((program, arguments, environment),) = called
    assert program == sys.executable and arguments[1:3] == ["-m", "posttrain.generation.chat"]
    assert "--prompt=--odd" in arguments and str(ROOT) in environment["PYTHONPATH"]

    from posttrain.generation.chat import _parse

    options = _parse(arguments[3:])
    assert (options.folder, options.prompt, options.max_new_tokens) == (tmp_path, "--odd", 3)
    assert (options.temperature, options.top_p, options.seed) == (0.5, 0.8, 4)


def test_no_probability_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="leaves no token"):
        chat.command(str(tmp_path), prompt="x", max_new_tokens=3, temperature=0.5, top_p=0.0, seed=4, outputs=tmp_path)


def test_the_help_names_the_temperatures_that_are_taken() -> None:
    from posttrain.generation.settings import LEAST_TEMPERATURE, MOST_TEMPERATURE

    (option,) = typing.get_type_hints(chat.command, include_extras=True)["temperature"].__metadata__
    assert f"{LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}" in option.help


def test_the_whole_way(tmp_path: Path) -> None:
    from source_models import make_source

    from posttrain.models.tiny import tiny_tokenizer

    make_source().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", "chat", "m", "--max-new-tokens", "4", "--temperature", "0"],
        cwd=tmp_path,
        env=environment,
        input=b"Hello\n/exit\n",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
