"""Arguments and options that several commands have, in one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value …]", help="Settings, in Hydra's grammar.")
]  # fmt: skip
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="This stage and what needs it.")]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="This stage and what it needs.")]
Only = Annotated[str | None, typer.Option("--only", metavar="STAGE", help="This stage alone.")]
Force = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STAGE", help="Run this stage although it is in the store; repeatable."),
]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the run's folder.")]
Multirun = Annotated[
    bool, typer.Option("-m", "--multirun", help="Sweep: overrides may list values (a,b; range(1,4); glob(*)).")
]
ConfigDir = Annotated[
    Path | None, typer.Option("--config-dir", metavar="DIR", help="Your own recipes and groups, looked at first.")
]
