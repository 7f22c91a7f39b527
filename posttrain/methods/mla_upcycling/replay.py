"""A saved plan carried out again: what a plan needs to know of it, from `conversion.json` and without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.shape import MlaShape, check_family, misfits
from posttrain.models.architecture import normalise
from posttrain.pipeline.stage import ArtifactMeta

if TYPE_CHECKING:
    from posttrain.methods.mla_upcycling.plan import MlaPlan
    from posttrain.pipeline.context import StageContext

FILES = ("conversion.json", "plan.safetensors")


def conversion_meta(shape: MlaShape, ranks: list[int] | None) -> ArtifactMeta:
    """What is known of a conversion: its shape and, once made, the rank of every layer."""
    return ArtifactMeta("conversion", extra={"shape": json.loads(json.dumps(asdict(shape))), "ranks": ranks})


def read_conversion(folder: Path) -> tuple[MlaShape, list[int]]:
    """Shape and ranks of a saved conversion.

    Raises:
        RecipeError: there is none.
    """
    require(folder)
    try:
        report = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        return MlaShape.from_json(report["shape"]), [layer["kv_lora_rank"] for layer in report["layers"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{folder / FILES[0]} is not the account of a conversion: {error}", where="plan") from error


def require(folder: Path) -> None:
    """Raise RecipeError unless the folder holds a saved plan."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise RecipeError(
            f"{folder} has no {' and no '.join(missing)}",
            where="plan",
            fix="give the `conversion` folder of an mla_upcycle stage, as its run's report names it",
        )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the plan's files: they decide the result."""
    from posttrain.pipeline.fingerprint import digest_path

    require(folder)
    return {name: digest_path(folder / name) for name in FILES}


def replayed_shape(
    cfg: MlaUpcycleConfig, conversion: ArtifactMeta | None, architecture: Mapping[str, Any]
) -> tuple[MlaShape, list[int] | None] | None:
    """Shape and ranks of the plan that is to be carried out again; None while it is unknown.

    Raises:
        RecipeError: no such plan, or it does not fit the model.
    """
    architecture = normalise(architecture)
    check_family(architecture)
    if cfg.plan_folder is not None:
        shape, ranks = read_conversion(cfg.plan_folder)
    elif conversion is not None and conversion.extra.get("shape"):
        shape, ranks = MlaShape.from_json(conversion.extra["shape"]), conversion.extra.get("ranks")
    else:
        return None
    if wrong := misfits(shape, architecture):
        where = "plan" if cfg.plan is not None else "inputs.conversion"
        raise RecipeError(
            f"the plan is for another model: {'; '.join(wrong)}",
            where=where,
            fix="give a plan of a model of this shape",
        )
    return shape, ranks


def replayed_plan(ctx: StageContext) -> MlaPlan | None:
    """The plan that the stage carries out again; None where it makes one."""
    if not ctx.config.replays:
        return None
    from posttrain.methods.mla_upcycling.plan import MlaPlan

    return MlaPlan.load(ctx.config.plan_folder or ctx.inputs["conversion"].path)
