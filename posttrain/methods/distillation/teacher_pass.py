"""The teacher's one pass over the sequences of a run, before training with `teacher_cache`."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import StageError
from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.models import hidden_states
from posttrain.methods.distillation.packing import PackedRows
from posttrain.methods.distillation.teacher_cache import TopKCache, fill, identity_of, is_complete, rows_per_shard
from posttrain.methods.distillation.topk import TopK, teacher_top_k
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.fingerprint import digest_path
from posttrain.training.order import run_order

FOLDER = "teacher_cache"


def cached_teacher(
    ctx: StageContext,
    config: DistillConfig,
    blocks: Tensor | PackedRows,
    load: Callable[[], PreTrainedModel],
) -> TopKCache:
    """The cache in the stage's work folder; the teacher is loaded only if something of it is missing, and freed after.

    Every sequence that the run uses is read once, however often it is used.

    Args:
        blocks: the training data, token ids `[N, T]` or packed documents.
        load: gives the teacher in its type and on its device.

    Raises:
        StopRequested: a stop was asked for; complete shards are kept.
        StageError: too little space on the disk.
    """
    packed = blocks if isinstance(blocks, PackedRows) else None
    ids = (blocks if packed is None else packed.ids).to(torch.int32)
    rows = run_order(len(ids), config.max_steps * config.sequences_per_step, ctx.seed).unique()
    read = {"tokens": ids[rows]}
    if packed is not None:
        read |= {"positions": packed.positions[rows], "real": packed.real[rows]}
    folder, identity = ctx.work_dir / FOLDER, identity_of(_settings(ctx, config), read)
    per_shard = rows_per_shard(config.sequence_length, config.teacher_cache.bytes_per_token)
    if not is_complete(folder, identity):
        began = time.monotonic()
        _require_space(folder, config, len(rows))
        teacher_pass = _Pass(ctx, config, read, load)
        with teacher_pass.ready():
            fill(folder, identity, len(rows), per_shard, teacher_pass.compute)
        ctx.progress(len(rows), len(rows), "teacher sequence")
        ctx.record_timing(teacher_pass_seconds=time.monotonic() - began)
    return TopKCache(folder, rows, per_shard)


def _require_space(folder: Path, config: DistillConfig, rows: int) -> None:
    """Refuse a pass that would fill the disk; what lies in the folder already is used again or removed."""
    needed = rows * config.sequence_length * config.teacher_cache.bytes_per_token
    there = sum(file.stat().st_size for file in folder.glob("shard-*"))
    free = shutil.disk_usage(folder.parent).free
    if free + there < needed:
        raise StageError(
            f"too little space: the teacher's cache needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(folder),
            fix="lower teacher_cache.top_k, free some, or choose another disk (paths.outputs=DIR)",
        )


def _settings(ctx: StageContext, config: DistillConfig) -> dict[str, object]:
    """What decides the kept values beside the tokens."""
    names = ("temperature", "teacher_dtype", "precision", "residual_dtype", "packing")
    cache = config.teacher_cache
    teacher = digest_path(Path(ctx.inputs["teacher"].path))
    return {"teacher": teacher, "top_k": cache.top_k, "dtype": cache.dtype} | {n: getattr(config, n) for n in names}


class _Pass:
    """The loaded teacher, computing under the precision and with the kernels of the training step."""

    def __init__(
        self,
        ctx: StageContext,
        config: DistillConfig,
        read: dict[str, Tensor],
        load: Callable[[], PreTrainedModel],
    ) -> None:
        self.ctx, self.config, self.read, self.load = ctx, config, read, load
        self.teacher: PreTrainedModel | None = None

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the teacher is there and fast; afterwards its memory is free."""
        config, device = self.config, torch.device(self.ctx.device)
        self.teacher = self.load().eval().requires_grad_(False)
        there = self.teacher.device.type
        # Not at the top: before transformers' Auto classes are there, which loading brings in, it cannot be imported.
        from posttrain.training import speed

        with contextlib.ExitStack() as stack:
            stack.enter_context(speed.attention_backends(config.attention, there))
            if config.packing == "stream":
                stack.enter_context(speed.causal_without_masks(self.teacher))
            if config.precision == "bf16":
                stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
                if config.residual_dtype == "bfloat16":
                    stack.enter_context(speed.bf16_residual_stream(self.teacher))
            compiled = config.compiles(there == "cuda") and (config.compile != "auto" or speed.can_compile())
            stack.enter_context(speed.fast_layers(self.teacher, compiled=compiled))
            stack.enter_context(torch.no_grad())
            yield
        self.teacher = None
        if there == "cuda":
            torch.cuda.empty_cache()

    def _report(self, row: int) -> None:
        self.ctx.progress(row, len(self.read["tokens"]), "teacher sequence")
        if self.ctx.should_stop():
            self.ctx.stop()

    def compute(self, places: range) -> tuple[TopK, Tensor]:
        """As `fill` wants it, a micro-batch at a time."""
        kept, masses = [], []
        size = self.config.micro_batch()
        for start in range(places.start, places.stop, size):
            self._report(start)
            rows = slice(start, min(start + size, places.stop))
            top = self._batch(rows)
            mass = -torch.expm1(top.logprobs[..., -1].double())  # [B, T], before it is rounded
            masses.append(mass[self._counts(rows)])
            kept.append(TopK(top.ids, top.logprobs.to(getattr(torch, self.config.teacher_cache.dtype))))
        return TopK(*(torch.cat(tensors) for tensors in zip(*kept, strict=True))), torch.cat(masses)

    def _batch(self, rows: slice) -> TopK:
        config, device = self.config, self.teacher.device
        ids = self.read["tokens"][rows].long().to(device)
        positions = self.read.get("positions")
        positions = None if positions is None else positions[rows].long().to(device)
        hidden = hidden_states(self.teacher, ids, positions)
        head = self.teacher.get_output_embeddings().weight
        top = teacher_top_k(
            hidden.flatten(0, 1), head, config.teacher_cache.top_k, config.temperature, config.chunk_tokens
        )
        return TopK(*(tensor.unflatten(0, ids.shape).cpu() for tensor in top))

    def _counts(self, rows: slice) -> Tensor:
        """Which tokens of the sequences are trained, `[B, T]`."""
        tokens = self.read["tokens"][rows]
        real = self.read["real"][rows].unsqueeze(1) if "real" in self.read else tokens.shape[1]
        return torch.arange(tokens.shape[1]).expand(tokens.shape) < real
