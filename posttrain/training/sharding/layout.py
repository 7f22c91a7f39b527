"""What a checkpoint says of the ranks that wrote it, and which ranks may go on from it."""

from __future__ import annotations

from pathlib import Path

from posttrain.config.schema import REPLICATED, SHARDED
from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import read_json, write_json
from posttrain.training.checkpoints import step_of

LAYOUT = "ranks.json"


def write_layout(checkpoint: Path, ctx: StageContext) -> None:
    """Record how the ranks held the model and how many they were."""
    write_json(checkpoint / LAYOUT, {"format": 1, "strategy": ctx.strategy, "world_size": ctx.world_size})


def require_readable(checkpoint: Path, ctx: StageContext, draws: str | None) -> None:
    """Refuse to go on where that cannot be, or where it would change the numbers by more than rounding.

    Args:
        draws: what is drawn from random numbers of each rank, so that other ranks would draw others; None: nothing.

    Raises:
        StageError: the checkpoint is of another way to hold the model, or ranks differ in number and `draws`.
    """
    path = checkpoint / LAYOUT
    if not path.is_file():
        # Of an earlier version, which knew whole models only and did not count ranks.
        saved, ranks = "ddp", ctx.world_size
    else:
        content = read_json(path)
        saved, ranks = content["strategy"], content["world_size"]
    over = f"start over with posttrain run … --force {ctx.name}"
    what = f"the checkpoint of step {step_of(checkpoint)} was written"
    if (saved in REPLICATED) != (ctx.strategy in REPLICATED):
        how = "with the whole model on every rank" if saved in REPLICATED else "in shards"
        engines = "engine=auto or engine=ddp" if saved in REPLICATED else _engines(saved)
        raise StageError(
            f"{what} {how} (strategy {saved}), which strategy {ctx.strategy} does not read",
            where=str(checkpoint),
            fix=f"go on with {engines}, or {over}",
        )
    if draws and ranks != ctx.world_size:
        raise StageError(
            f"{what} by {ranks} rank{'s' if ranks > 1 else ''}; {ctx.world_size} would go on with other numbers: "
            f"{draws}",
            where=str(checkpoint),
            fix=f"go on with engine.ranks={ranks}, or {over}",
        )


def _engines(saved: str) -> str:
    """Any sharded engine reads what another wrote; the one that did comes first."""
    return " or ".join(f"engine={name}" for name in sorted(SHARDED, key=lambda name: (name != saved, name)))
