"""What a cache of the teacher takes, by formula; the rest is `posttrain.training.estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.methods.distillation.config import DistillConfig
from posttrain.training.estimate import ELEMENT_SIZE, training_memory


def logit_copies(cfg: DistillConfig) -> int:
    """fp32 `[chunk, V]` tensors alive at once in the loss: the teacher's logits are there only without a cache."""
    return (2 if cfg.teacher_cache else 3) + bool(cfg.ce_weight)


def cache_bytes(cfg: DistillConfig, data_tokens: int | None) -> int:
    """Disk of the cache, if there is one: every position of a sequence that the run uses, once."""
    if cfg.teacher_cache is None:
        return 0
    used = cfg.max_steps * cfg.tokens_per_step
    return cfg.teacher_cache.bytes_per_token * (used if data_tokens is None else min(used, data_tokens))


def cache_notes(cfg: DistillConfig, cached: int) -> tuple[str, ...]:
    """How much of the stage's disk is the cache."""
    if cfg.teacher_cache is None:
        return ()
    size = f"{cached / 1e9:.1f} GB" if cached >= 1e9 else f"{cached / 1e6:.1f} MB"
    return (f"{size} of the disk are the teacher's cache, which goes when the stage is done",)


def peak_of_both(
    cfg: DistillConfig, training: dict[str, int], student: Mapping[str, Any], teacher: Mapping[str, Any] | None
) -> dict[str, int]:
    """Memory terms of the larger of training and, with a cache, the teacher's pass before it (beside the student)."""
    if cfg.teacher_cache is None or teacher is None:
        return training
    tokens = cfg.micro_batch() * cfg.sequence_length
    live = training_memory(
        student,
        0,
        tokens,
        cfg.chunk_tokens,
        logit_copies=1,
        teacher=teacher,
        teacher_bytes=ELEMENT_SIZE[cfg.teacher_dtype],
    )
    passing = {name: live[name] for name in ("weights", "logits", "teacher")}
    return max(training, passing, key=lambda terms: sum(terms.values()))
