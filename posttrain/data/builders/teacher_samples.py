"""Text that the input model writes itself: answers to varied prompts, sampled at its own temperature.

Text of the source model's own is near to what it was trained on, which nobody else has. Re-entrant: every finished
batch is in `partial.jsonl`, and each batch draws its own random numbers, so a resumed run writes the same text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.builders.prompts import built_in
from posttrain.data.chat import plain_text
from posttrain.data.config import Samples
from posttrain.data.documents import Document
from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PARTIAL = "partial.jsonl"
LICENCE = "that of the model that wrote it"


def prompts_of(samples: Samples) -> list[tuple[str, str]]:
    """(group, prompt) of every answer to be written, in order."""
    if samples.prompts is None:
        return built_in(samples.num_samples)
    own = samples.prompts
    return [(own[number % len(own)], own[number % len(own)]) for number in range(samples.num_samples)]


def build(samples: Samples, ctx: StageContext) -> list[Document]:
    """One conversation of one turn for every prompt; empty answers are left out.

    Raises:
        StageError: the model wrote nothing at all.
        StopRequested: a stop was asked for; the finished batches are kept.
    """
    prompts = prompts_of(samples)
    batches = [prompts[start : start + samples.batch_size] for start in range(0, len(prompts), samples.batch_size)]
    partial = ctx.work_dir / PARTIAL
    answers = _finished(partial, batches)
    if len(answers) < len(batches):
        _sample(samples, ctx, batches, answers, partial)
    documents = [
        _document(number, group, prompt, answer)
        for number, ((group, prompt), answer) in enumerate(zip(prompts, sum(answers, []), strict=True))
        if answer.strip()
    ]
    ctx.record_result(empty_answers=len(prompts) - len(documents))
    if not documents:
        raise StageError(
            "the model wrote only empty answers", fix="check its chat template and EOS, or give other prompts"
        )
    return documents


def _sample(
    samples: Samples,
    ctx: StageContext,
    batches: Sequence[list[tuple[str, str]]],
    answers: list[list[str]],
    partial: Path,
) -> None:
    """Extend `answers` and the partial file by one entry a batch."""
    import torch

    from posttrain.models.loading import load_model, load_tokenizer

    folder = ctx.inputs["model"].path
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device=ctx.device, dtype=getattr(torch, samples.dtype)).eval()
    with partial.open("a", encoding="utf-8") as file:
        for number in range(len(answers), len(batches)):
            ctx.progress(number, len(batches), unit="batch")
            if ctx.should_stop():
                ctx.stop(number)
            seed = _batch_seed(ctx.seed, number)
            texts = generate(model, tokenizer, [prompt for _, prompt in batches[number]], samples, seed)
            file.write(json.dumps({"batch": number, "answers": texts}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            answers.append(texts)
    ctx.progress(len(batches), len(batches), unit="batch")


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], samples: Samples, seed: int
) -> list[str]:
    """A sampled answer to each prompt, special tokens left out. The global random state stays as it was."""
    import torch

    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [_with_template(prompt, tokenizer) for prompt in prompts]
    chat = tokenizer.chat_template is not None
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=samples.temperature,
            top_p=samples.top_p,
            top_k=0,
            max_new_tokens=samples.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    written = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _with_template(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    turn = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        return f"{plain_text(turn)}\n\nAssistant:"
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _document(number: int, group: str, prompt: str, answer: str) -> Document:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    messages = tuple((turn["role"], turn["content"]) for turn in turns)
    return Document(id=f"sample-{number:06d}", text=plain_text(turns), group=group, messages=messages)


def _batch_seed(seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"teacher_samples/{seed}/{batch}".encode()).digest()[:7], "big")


def _finished(partial: Path, batches: Sequence[list[Any]]) -> list[list[str]]:
    """Answers of the batches that an earlier attempt finished; the file is cut behind the last whole one."""
    if not partial.is_file():
        return []
    answers: list[list[str]] = []
    good = 0
    for raw in partial.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            entry = None
        number = len(answers)
        if entry is None or entry["batch"] != number or len(entry["answers"]) != len(batches[number]):
            break
        answers.append(entry["answers"])
        good += len(raw)
    os.truncate(partial, good)
    return answers
