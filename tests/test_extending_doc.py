"""The code in docs/extending.md does what the page says."""

from __future__ import annotations

import random
import re
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from posttrain.config import plugins
from posttrain.data.documents import Document
from posttrain.data.foreign import Builder
from posttrain.models.architecture import normalise
from posttrain.pipeline.context import StageContext

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def run(marker: str, **given) -> dict:
    (code,) = [block for block in blocks("python") if marker in block]
    exec(compile(code, "extending.md", "exec"), given)
    return given


def test_the_groups_are_those_that_are_read() -> None:
    (text,) = blocks("toml")
    points = tomllib.loads(text)["project"]["entry-points"]
    assert set(points) == set(plugins.KINDS)
    assert set(re.findall(r"^\| `(posttrain\.\w+)` \|", PAGE, flags=re.MULTILINE)) == set(plugins.KINDS)


def test_the_builder_builds(tmp_path: Path) -> None:
    def problem(source: random.Random, number: int) -> Document:
        return Document(id=str(number), text=str(source.random()))

    given = {"BaseModel": BaseModel, "ConfigDict": ConfigDict, "Field": Field, "Builder": Builder}
    found = run("class Arithmetic", __name__="page", random=random, problem=problem, **given)
    builder, settings = found["Arithmetic"](), found["Settings"](count=3)
    assert builder.size(settings) == 120
    made = builder.build(settings, StageContext("data", settings, tmp_path, seed=1))
    assert len(made) == 3 and made == builder.build(settings, StageContext("data", settings, tmp_path, seed=1))


def test_the_reward_scores() -> None:
    assert run("def brevity")["brevity"](["p", "q"], ["one two three", ""], [{}, {}]) == [0.25, 1.0]


def test_the_architecture_is_one_that_can_be_counted() -> None:
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    described = run("def architecture")["architecture"]({**shape, "model_type": "my_decoder", "ffn_width": 48})
    assert normalise(described)["intermediate_size"] == 48


def test_the_loop_stops_and_goes_on(tmp_path: Path) -> None:
    units, kept = list("abcd"), []
    ctx = StageContext("s", None, tmp_path)

    def keep(found: str) -> None:
        kept.append(found)
        if len(kept) == 2:
            (tmp_path / "STOP").touch()

    from posttrain.errors import StopRequested

    stopped = []
    try:
        run("ctx.should_stop", ctx=ctx, units=units, done=[], keep=keep, work=str.upper)
    except StopRequested as stop:
        stopped.append(stop.step)
    (tmp_path / "STOP").unlink()
    run("ctx.should_stop", ctx=ctx, units=units, done=list(kept), keep=kept.append, work=str.upper)
    assert stopped == [2] and kept == list("ABCD")


def test_files_that_the_page_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGE)
    assert links and all((Path(__file__).parents[1] / "docs" / link).exists() for link in links)
