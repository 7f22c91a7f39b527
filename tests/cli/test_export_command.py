"""`posttrain export`, the whole way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.cli import export
from posttrain.errors import RecipeError

ROOT = Path(__file__).parents[2]


def test_a_full_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="not an empty folder"):
        export.command(str(tmp_path), out=tmp_path, outputs=tmp_path)


def test_advice_is_told_in_the_commands_options() -> None:
    from posttrain.methods.export.program import in_options

    advice = "use pad_ranks=true (exact), or use to=native; loader=vllm"
    assert in_options(advice) == "use --pad-ranks (exact), or use --to native; --loader vllm"


def test_the_whole_way(tmp_path: Path) -> None:
    from source_models import make_source

    from posttrain.models.tiny import tiny_tokenizer

    make_source().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlicense: mit\n---\n# Of somebody else\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "posttrain", "export", "m", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    refused = run("--to", "deepseek_v3", "--out", "no")
    assert refused.returncode == 2 and "not every layer has latent attention" in refused.stderr
    assert "at: --to deepseek_v3\n  do: convert all layers, or use --to native\n" in refused.stderr
    assert not (tmp_path / "no").exists()
    refused = run("--to", "falcon_h1", "--out", "no")
    assert refused.returncode == 2 and "no layer carries a state" in refused.stderr
    done = run("--out", "yes")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "yes" / "certificate.json").read_text())["class"] == "LlamaForCausalLM"
    readme = (tmp_path / "yes" / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: transformers\n") and "\nlicense: mit\n" in readme
    assert "Of somebody else" not in readme and "where it comes from is unknown" in readme
