"""Settings of the `evaluate` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.pipeline.stage import NOT_IN_KEY, StageConfig

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "List three fruits.",
    "Write a short polite email asking for a day off.",
)


class EvaluateConfig(StageConfig):
    """Held-out perplexity, agreement with a baseline, cache bytes, speed and sample texts of one model."""

    type: Literal["evaluate"] = "evaluate"
    max_documents: int = Field(40, ge=2, description="Documents to score, from the start of the data set.")
    max_tokens: int = Field(
        512,
        ge=2,
        description="Window length in tokens; never more than the model's max_position_embeddings. "
        "The first token of a window is context and is not scored.",
    )
    max_windows: int = Field(
        1, ge=1, description="Non-overlapping windows scored per document, from its start; the rest is left out."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Data type the weights are cast to, and so of the activations and the cache. Log-probabilities "
        "are always taken in fp32 and summed in fp64.",
    )
    chunk_tokens: int = Field(
        256,
        ge=1,
        description="Tokens whose logits exist at once: memory only, not the result.",
        json_schema_extra=NOT_IN_KEY,
    )
    bootstrap_samples: int = Field(
        1000, ge=100, description="Resamples of the documents behind the 95 % intervals (seeded)."
    )
    prompts: tuple[str, ...] = Field(
        PROMPTS,
        description="User messages answered greedily by the model and by the baseline, through the chat template if "
        "the model has one, else continued as plain text. May be empty.",
    )
    generate_tokens: int = Field(48, ge=1, description="Most tokens generated per prompt.")
    prefill_tokens: int = Field(256, ge=2, description="Prompt length of the speed measurement, tokens per sequence.")
    decode_tokens: int = Field(32, ge=1, description="Tokens decoded one by one after that prompt, per sequence.")
    batch_size: int = Field(1, ge=1, description="Sequences side by side in the speed measurement.")
    repeats: int = Field(
        3, ge=0, description="Timed repeats after one warm-up; the median counts. 0 leaves the speed measurement out."
    )
