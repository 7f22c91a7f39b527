"""Text that the input model writes itself: answers to varied prompts, sampled at its own temperature.

Text of the source model's own is near to what it was trained on, which nobody else has. Re-entrant: every finished
batch is in `partial.jsonl`, and each batch draws its own random numbers, so a resumed run writes the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from posttrain.data.builders.batches import batch_seed, cut, in_batches
from posttrain.data.builders.prompts import built_in
from posttrain.data.chat import plain_text
from posttrain.data.documents import Document
from posttrain.data.sections import PairSamples, Samples
from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    batches = cut(prompts, samples.batch_size)
    answers = in_batches(ctx, batches, lambda: _sampler(samples, ctx, batches))
    documents = [
        _document(number, group, prompt, answer)
        for number, ((group, prompt), answer) in enumerate(zip(prompts, answers, strict=True))
        if answer.strip()
    ]
    ctx.record_result(empty_answers=len(prompts) - len(documents))
    if not documents:
        raise StageError(
            "the model wrote only empty answers", fix="check its chat template and EOS, or give other prompts"
        )
    return documents


def _sampler(
    samples: Samples, ctx: StageContext, batches: Sequence[list[tuple[str, str]]]
) -> Callable[[int], list[str]]:
    model, tokenizer = load_writer(ctx, samples.dtype)

    def sample(number: int) -> list[str]:
        prompts = [prompt for _, prompt in batches[number]]
        return generate(model, tokenizer, prompts, samples, batch_seed("teacher_samples", ctx.seed, number))

    return sample


def load_writer(ctx: StageContext, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The input model that writes, with its tokenizer."""
    import torch

    from posttrain.models.loading import load_model, load_tokenizer

    folder = ctx.inputs["model"].path
    return load_model(folder, device=ctx.device, dtype=getattr(torch, dtype)).eval(), load_tokenizer(folder)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    samples: Samples | PairSamples,
    seed: int,
) -> list[str]:
    """A sampled answer to each prompt, special tokens left out. The global random state stays as it was."""
    return [text for text, _ in write(model, tokenizer, prompts, samples, seed)]


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    samples: Samples | PairSamples,
    seed: int,
) -> list[tuple[str, bool]]:
    """As `generate`, with whether the model ended its answer itself, before `max_new_tokens`."""
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
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    texts = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [(text, not ends.isdisjoint(row)) for text, row in zip(texts, written.tolist(), strict=True)]


def _with_template(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    turn = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        return f"{plain_text(turn)}\n\nAssistant:"
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _document(number: int, group: str, prompt: str, answer: str) -> Document:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    messages = tuple((turn["role"], turn["content"]) for turn in turns)
    return Document(id=f"sample-{number:06d}", text=plain_text(turns), group=group, messages=messages)
