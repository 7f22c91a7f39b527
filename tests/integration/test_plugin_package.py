"""Packages of others, installed by pip into a folder of their own and used through the real command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT
from plugin_packages import stage_module

from posttrain import testing

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "posttrain-other"
version = "0.4"

[project.entry-points."posttrain.stages"]
counted = "other_lab.stage:Own"

[project.entry-points."posttrain.config"]
other = "other_lab"

[project.entry-points."posttrain.data"]
numbers = "other_lab.data:Numbers"

[tool.setuptools]
packages = ["other_lab"]

[tool.setuptools.package-data]
other_lab = ["conf/**/*.yaml", "recipes/*.yaml"]
"""
DATA = """
from posttrain.data.documents import Document
from posttrain.data.foreign import Builder


class Numbers(Builder):
    version = "2"

    def build(self, cfg, ctx):
        return [Document(id=str(n), text=f"number {n}") for n in range(20)]
"""
STAGE = stage_module("counted").replace(
    '    outputs = {"history"', '    inputs = {"data": InputSpec("dataset")}\n    outputs = {"history"'
)
STAGE = STAGE.replace("import ArtifactMeta,", "import ArtifactMeta, InputSpec,")
RECIPE = """# A recipe of another package:  posttrain run other_demo
defaults:
  - base
  - data: number_text
  - stage@stages.count: counted
  - _self_
description: Counts.
stages:
  count: {inputs: {data: data.train}}
scales:
  smoke: [stages.count.size=2]
"""
FILES = {
    "pyproject.toml": PROJECT,
    "other_lab/__init__.py": "",
    "other_lab/stage.py": STAGE,
    "other_lab/data.py": DATA,
    "other_lab/conf/stage/counted.yaml": "# Counts. Settings: `posttrain show counted`.\ntype: counted\n",
    "other_lab/conf/data/number_text.yaml": "# Numbers in words.\nbuilder: numbers\nlabel: numbers\n",
    "other_lab/recipes/other_demo.yaml": RECIPE,
}


def pip_install(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to install into that commands of this test see."""
    site = tmp_path / "site"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(site)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return site


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_package_of_others_from_list_to_report(environment: Path, tmp_path: Path) -> None:
    pip_install(write(tmp_path / "source", FILES), environment)
    listed = re.sub(r" +", " ", testing.posttrain("list", cwd=tmp_path))  # columns are as wide as the longest name
    assert "counted Counts (posttrain-other)" in listed and "other_demo Counts. (posttrain-other)" in listed
    assert "posttrain-other 0.4 recipes and options, data builder numbers, stage type counted" in listed
    assert "settings:\n  size: a whole number; default 3" in testing.posttrain("show", "counted", cwd=tmp_path)

    testing.posttrain("run", "other_demo", "scale=smoke", cwd=tmp_path)
    artifact = testing.artifact(tmp_path / "outputs", "count")
    assert (artifact / "history" / "history.jsonl").read_text() == "{}\n{}\n"
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["versions"]["posttrain-other"] == "0.4"
    assert manifest["key_document"]["package"] == "posttrain-other"
    data = json.loads((testing.artifact(tmp_path / "outputs", "data") / "manifest.json").read_text())
    assert data["versions"]["posttrain-other"] == "0.4"
    assert data["key_document"]["external"]["builder"] == {"package": "posttrain-other", "version": "2"}
    assert "Nothing to do" in testing.posttrain("plan", "other_demo", "scale=smoke", cwd=tmp_path)
    testing.posttrain("verify", "all", cwd=tmp_path)

    # Without the package its finished runs can still be looked at, and a recipe that needs it says so.
    environment.rename(tmp_path / "elsewhere")
    testing.posttrain("report", cwd=tmp_path)
    with pytest.raises(AssertionError, match="there is no recipe `other_demo`"):
        testing.posttrain("run", "other_demo", cwd=tmp_path)


def test_a_package_that_breaks_is_one_message_before_anything_runs(environment: Path, tmp_path: Path) -> None:
    pip_install(write(tmp_path / "source", FILES), environment)
    (environment / "other_lab" / "__init__.py").write_text("raise ImportError('libother.so is missing')\n")
    with pytest.raises(AssertionError) as caught:
        testing.posttrain("run", "other_demo", cwd=tmp_path)
    text = str(caught.value)
    assert "`counted` of the installed package posttrain-other 0.4 cannot be loaded" in text
    assert "libother.so is missing" in text and "Traceback" not in text and text.startswith("exit 2")


EVERYTHING = {
    "pyproject.toml": PROJECT.replace('"other_lab"]', '"other_lab"]\npy-modules = ["other_light", "other_classes"]')
    + """
[project.entry-points."posttrain.models"]
other_model = "other_light"

[project.entry-points."posttrain.rewards"]
nothing_counts = "other_light:nothing_counts"
""",
    "other_light.py": """
def register():
    from transformers import AutoConfig, AutoModelForCausalLM

    from other_classes import OtherConfig, OtherModel

    AutoConfig.register("other_model", OtherConfig, exist_ok=True)
    AutoModelForCausalLM.register(OtherConfig, OtherModel, exist_ok=True)


def architecture(config):
    return {**config, "model_type": "llama"}


def nothing_counts(prompts, completions, rows):
    return [0.0 for _ in completions]
""",
    "other_classes.py": """
from transformers import LlamaConfig, LlamaForCausalLM


class OtherConfig(LlamaConfig):
    model_type = "other_model"


class OtherModel(LlamaForCausalLM):
    config_class = OtherConfig
""",
    "other_lab/conf/model/other_tiny.yaml": """# Random weights of a class of another package.
random: true
architecture:
  {model_type: other_model, vocab_size: 300, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2,
   num_attention_heads: 4, num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true,
   max_position_embeddings: 512, initializer_range: 0.1}
""",
    "other_lab/recipes/other_chain.yaml": """# Every stage that takes a foreign model.
defaults:
  - base
  - model: other_tiny
  - data: number_text
  - data@datasets.pairs: reasoning_gym_pairs
  - stage@stages.tune: sft
  - stage@stages.distill: distill
  - stage@stages.prefer: preference
  - stage@stages.evaluate: evaluate
  - _self_
description: Tunes, distils, prefers, evaluates.
datasets:
  pairs: {inputs: {model: model}}
stages:
  tune: {inputs: {model: model, data: data.train}, loss_on: all, max_steps: 2, tokens_per_step: 64, sequence_length: 32}
  distill:
    {inputs: {student: tune.model, teacher: model, data: data.train}, max_steps: 2, tokens_per_step: 64,
     sequence_length: 32}
  prefer:
    {inputs: {model: distill.model, data: datasets.pairs.train}, keep: trained, max_steps: 2, pairs_per_step: 2,
     sequence_length: 256}
  evaluate:
    {inputs: {model: prefer.model, baseline: model, data: data.heldout}, max_documents: 2, max_tokens: 64,
     generate_tokens: 4, repeats: 0}
""",
}


@pytest.mark.slow
def test_a_foreign_model_goes_through_the_stages_and_a_reward_makes_its_pairs(
    environment: Path, tmp_path: Path
) -> None:
    pip_install(write(tmp_path / "source", {**FILES, **EVERYTHING}), environment)
    pairs = ["size=16", "pairs.reward=nothing_counts", "pairs.max_new_tokens=4", "pairs.tries=1"]
    settings = [f"datasets.pairs.{'gym.' if text.startswith('size') else ''}{text}" for text in pairs]
    testing.posttrain("run", "other_chain", *settings, cwd=tmp_path)
    for stage in ("tune", "distill", "prefer"):
        artifact = testing.artifact(tmp_path / "outputs", stage)
        assert json.loads((artifact / "model" / "config.json").read_text())["model_type"] == "other_model"
        assert json.loads((artifact / "manifest.json").read_text())["versions"]["posttrain-other"] == "0.4"


@pytest.mark.timeout(600)
def test_what_new_writes_passes_its_own_tests(environment: Path, tmp_path: Path) -> None:
    testing.posttrain("new", "stage", "soft_labels", "--dir", str(tmp_path), cwd=tmp_path)
    package = tmp_path / "posttrain-soft-labels"
    pip_install(package, environment)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout


def test_what_init_writes_runs(environment: Path, tmp_path: Path) -> None:
    testing.posttrain("init", "mine", cwd=tmp_path)
    testing.posttrain("run", "mine", "--config-dir", ".", "scale=smoke", cwd=tmp_path / "mine")
    assert (testing.artifact(tmp_path / "mine" / "outputs", "train") / "history" / "history.jsonl").is_file()
