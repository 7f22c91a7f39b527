"""How the ranks of a stage hold the model that they train: whole on each, or in shards.

`make_sharding` gives the strategy of a context (`engine.strategy` of the recipe). What a trainer needs of it is
`base.Sharding`; torch and DeepSpeed are imported by the strategies alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.config.schema import REPLICATED
from posttrain.errors import StageError

if TYPE_CHECKING:
    from posttrain.pipeline.context import StageContext
    from posttrain.training.sharding.base import Sharding


def make_sharding(ctx: StageContext) -> Sharding | None:
    """The strategy by which the ranks of this context share a model; None: each has all of it.

    Raises:
        StageError: there is no process group, or DeepSpeed is not installed.
    """
    if ctx.strategy in REPLICATED:
        return None
    import torch.distributed as dist

    if not dist.is_initialized():
        raise StageError(f"engine {ctx.strategy} needs a process group", where=f"stages.{ctx.name}")
    if ctx.strategy == "fsdp2":
        from posttrain.training.sharding.fsdp2 import Fsdp2

        return Fsdp2(ctx)
    from posttrain.training.sharding.zero import Zero

    return Zero(ctx)
