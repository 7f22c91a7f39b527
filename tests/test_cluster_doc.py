"""The files shown in docs/cluster.md are those that the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from posttrain.cli.submit import with_launcher
from posttrain.config import load_recipe
from posttrain.launch.slurm.submit import dry_run
from posttrain.pipeline.plan import make_plan

PAGE = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text(encoding="utf-8")


def test_the_page_shows_what_would_be_submitted(tmp_path, monkeypatch) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    (command,) = [block for block in blocks if "engine.nodes=4" in block]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["posttrain", "submit", "x_ecomla"] and words[-4:] == ["--name", "big", "--dry-run", "--yes"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    shown = dry_run(make_plan(load_recipe("x_ecomla", with_launcher(words[3:-4])), name="big"))
    # A page cannot know where its reader works, nor from which checkout.
    shown = re.sub(r"^export PYTHONPATH=.*\n", "", shown.replace(str(tmp_path), "/scratch/me"), flags=re.MULTILINE)
    files = [block for block in blocks if block.startswith("# ==> ")]
    assert len(files) == 2 and "distill.sh <==" in files[0] and "the commands <==" in files[1]
    for block in files:
        assert block.strip() in shown
