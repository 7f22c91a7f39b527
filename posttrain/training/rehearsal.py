"""Try the way results are saved before the first step, not after the last."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from posttrain.errors import StageError


def rehearse_save(folder: Path, model: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, needed: int) -> None:
    """Write the config and the model's first tensor into a scratch folder, read both back, and look at the free space.

    Args:
        folder: where the results will lie; the scratch folder is made in it and removed.
        dtype: type the weights will be saved in.
        needed: bytes that checkpoints and results will take.

    Raises:
        StageError: too little space, or what comes back is not what was written.
    """
    scratch = folder / ".rehearsal"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        free = shutil.disk_usage(scratch).free
        # Checkpoints of an earlier attempt are counted among those needed, and give way to new ones.
        there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
        if free + there < needed:
            raise StageError(
                f"too little space: checkpoints and results need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                where=str(folder),
                fix="free some, choose another disk (paths.outputs=DIR), or keep fewer checkpoints",
            )
        _write_and_read(scratch, model, config, dtype)
    except OSError as error:
        raise StageError(f"results cannot be written: {error}", where=str(folder)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_and_read(scratch: Path, model: nn.Module, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    name, parameter = next(iter(model.named_parameters()))
    tensor = parameter.detach().to("cpu", dtype).contiguous()
    save_file({name: tensor}, scratch / "model.safetensors", metadata={"format": "pt"})
    if not torch.equal(load_file(scratch / "model.safetensors")[name], tensor):
        raise StageError("a tensor read back differs from what was written", where=str(scratch.parent))
    config.save_pretrained(scratch)
    if AutoConfig.from_pretrained(scratch).model_type != config.model_type:
        raise StageError("the model's config read back differs from what was written", where=str(scratch.parent))
