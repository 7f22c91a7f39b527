"""Peak memory of a rank whose model is in shards, from shapes alone; no torch, for plans.

Legend: P parameters, T trained ones, N ranks, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.deepspeed import BUCKET
from posttrain.models.architecture import parameter_count

FLOAT = 4
"""Bytes of an element: weights, gradients and moments are fp32."""


def sharded_memory(arch: Mapping[str, Any], trainable: int, strategy: str, ranks: int) -> dict[str, int]:
    """Bytes of weights, gradients and moments on one of `ranks` ranks.

    - zero2: P weights whole, and the T/N that a rank updates once more; T/N gradients and the bucket in which they are
      summed; 2 T/N moments.
    - zero3: P/N weights, T/N of them once more; gathered: embeddings and head, and a bucket fetched ahead of a layer.
    - fsdp2: P/N weights; gathered: embeddings and head, and two layers; of both also the gradients.
    """
    everything, outside = parameter_count(arch), outside_layers(arch)
    layer = -(-(everything - outside) // arch["num_hidden_layers"])
    bucket = min(BUCKET, trainable)
    mine = -(-trainable // ranks)
    weights = {
        "zero2": everything + mine,
        "zero3": -(-everything // ranks) + mine + outside + layer + min(BUCKET, everything),
        "fsdp2": -(-everything // ranks) + outside + 2 * layer,
    }[strategy]
    gradients = mine + (min(outside + layer, trainable) if strategy == "fsdp2" else bucket + min(outside, trainable))
    return {"weights": FLOAT * weights, "gradients": FLOAT * gradients, "optimizer": 2 * FLOAT * mine}


def sharded_teacher(arch: Mapping[str, Any], element_size: int, ranks: int) -> int:
    """Bytes of a frozen model's weights: shards, the head, and what is gathered of it at a time."""
    everything, outside = parameter_count(arch), outside_layers(arch)
    layer = -(-(everything - outside) // arch["num_hidden_layers"])
    return element_size * (-(-everything // ranks) + outside + 2 * layer)


def outside_layers(arch: Mapping[str, Any]) -> int:
    """Parameters of embeddings and head."""
    return (1 if arch["tie_word_embeddings"] else 2) * arch["vocab_size"] * arch["hidden_size"]
