"""The two models of a distillation: what is trained of the student, where the teacher sits, what the loss takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.errors import StageError
from posttrain.training.adapters import LoraSettings, peft_config

if TYPE_CHECKING:
    from peft import PeftModel


def hidden_states(model: Any, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """What the model's head multiplies: the normalised last hidden states [B, T, D].

    `positions` [B, T] that start anew inside a row part it into documents that do not see each other. A model that PEFT
    wrapped is asked below the wrapping, with its adapters.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    # Named only when given: whole rows keep the call, and with it the compiled graph, that they had.
    extra = {} if positions is None else {"position_ids": positions}
    return model.base_model(input_ids=ids, use_cache=False, **extra).last_hidden_state


def teacher_device(wanted: str, student: torch.device) -> torch.device:
    """The device `teacher_device` names.

    Raises:
        StageError: this machine does not have it.
    """
    device = student if wanted == "same" else torch.device(wanted)
    if wanted.startswith("cuda") and device.index >= torch.cuda.device_count():
        raise StageError(
            f"there is no {wanted}: {torch.cuda.device_count()} CUDA devices are visible",
            where="teacher_device",
            fix="teacher_device=same",
        )
    return device


def add_adapters(model: PreTrainedModel, lora: LoraSettings, seed: int) -> PeftModel:
    """The model with new adapters, which alone are trained; they start as no change and depend on the seed alone.

    Raises:
        StageError: no layer has such a name, or the output head would get an adapter, which the loss would pass by.
    """
    from peft import get_peft_model

    problem = ""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(model, peft_config(lora))
        except ValueError as error:
            problem = str(error).splitlines()[0]
    if not problem and hasattr(model.get_output_embeddings(), "base_layer"):
        problem = "the output head cannot have an adapter: the loss multiplies by its weight alone"
    if problem:
        raise StageError(problem, where="lora.target_modules", fix="lora.target_modules=all-linear")
    return model


def check_heads(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse models whose logits are not `hidden @ head.T` over one vocabulary.

    Raises:
        StageError: vocabularies differ, or a head has a bias, or logits are scaled or capped.
    """
    rows = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if rows[0] != rows[1]:
        raise StageError(
            f"student and teacher have {rows[0]} and {rows[1]} vocabulary rows",
            fix="use a teacher of the same vocabulary, or cut padded rows off the larger model's embedding",
        )
    for role, model in (("student", student), ("teacher", teacher)):
        head = model.get_output_embeddings()
        odd = ["a head with a bias"] if getattr(head, "bias", None) is not None else []
        for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            odd += [field] if getattr(model.config, field, None) not in (None, 1, 1.0) else []
        if odd:
            raise StageError(f"the {role} ({type(model).__name__}) has {', '.join(odd)}, which the loss does not know")
