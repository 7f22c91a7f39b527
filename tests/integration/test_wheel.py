"""The built wheel, used from another folder with nothing of the checkout on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from harness import ROOT

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "posttrain", "kernels", "conf", "recipes", "data")

MINE = """
defaults:
  - transmla
  - _self_
description: Mine.
stages:
  train: {max_steps: 4}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source / name)
    (source / "conf" / "local").mkdir(exist_ok=True)
    (source / "conf" / "local" / "default.yaml").write_text("seed: 99\n")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("posttrain-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    shutil.rmtree(source)
    return folder


def posttrain(installed: Path, *arguments: str, cwd: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"PYTHONPATH": str(installed / "site"), "POSTTRAIN_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_carries_recipes_groups_data_kernels_and_scaffolds_but_no_local_settings(installed: Path) -> None:
    (wheel,) = installed.glob("posttrain-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in (("conf", "posttrain/_conf"), ("recipes", "posttrain/_recipes")):
        shipped = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.yaml")]
        assert shipped and all(
            f"{prefix}/{path.as_posix()}" in names for path in shipped if path.parts[0] != "local"
        ), folder
    code = subprocess.run(["git", "ls-files", "posttrain", "kernels/posttrain_kernels"], cwd=ROOT, capture_output=True)
    tracked = [name.removeprefix("kernels/") for name in code.stdout.decode().split() if not name.endswith(".md")]
    assert [name for name in tracked if name not in names] == []
    assert not any(name.startswith(("posttrain/_conf/local/", "tests/", "build/")) for name in names)


def test_it_runs_in_a_folder_of_ones_own(installed: Path, tmp_path: Path) -> None:
    listed = posttrain(installed, "list", cwd=tmp_path)
    assert "x_ecomla" in listed and "smollm2_135m" in listed
    own = tmp_path / "mine"
    (own / "recipes").mkdir(parents=True)
    (own / "conf" / "model").mkdir(parents=True)
    (own / "conf" / "local").mkdir()
    (own / "recipes" / "my_recipe.yaml").write_text(MINE)
    shutil.copy(ROOT / "conf" / "model" / "tiny.yaml", own / "conf" / "model" / "mine.yaml")
    (own / "conf" / "local" / "default.yaml").write_text("paths: {outputs: my_outputs}\n")
    run = ["run", "my_recipe", "data=tiny", "--config-dir", str(own), "--until", "train"]
    small = ["scale=smoke", "model=mine", "stages.train.max_steps=4"]
    said = posttrain(installed, *run, *small, cwd=tmp_path)
    assert "my_outputs/runs/my_recipe-" in said, "the settings of this machine are read"
    assert (tmp_path / "my_outputs" / "store" / "sft").is_dir()
    site = next((tmp_path / "my_outputs").glob("store/sft/*/manifest.json")).read_text()
    assert '"not run from a git checkout"' in site
