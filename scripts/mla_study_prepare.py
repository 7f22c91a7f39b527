"""What all arms of the study share: the source (healed or not), its own chats, and token blocks."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.data.builders.prompts import TASKS, TOPICS
from posttrain.data.reading import encode_documents, read_card, read_rows, token_blocks
from posttrain.generation import DecodeEngine, Sampling
from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.trainer import hidden_states, next_tokens
from posttrain.models.loading import load_model, load_tokenizer, save_model
from posttrain.pipeline.context import StageContext
from posttrain.training.blocks import OrderedBlocks, collate
from posttrain.training.logprob import token_logprobs
from posttrain.training.trainer import StageTrainer

HELDOUT_TOPICS = 10
HELDOUT_TOKENS = 512
"""Window of the held-out blocks."""
HELDOUT_BLOCKS = 64
CALIBRATION_TOKENS = 128 * 256
ROWS = 1024


class HealTrainer(StageTrainer):
    """Next-token training of the source itself: what 4-bit rounding took is given back before anything is compared."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        ids = inputs["input_ids"]
        targets = next_tokens(ids)
        head = self.model.get_output_embeddings().weight
        found = token_logprobs(hidden_states(model, ids), head, targets, entropy=False)
        return -found.logprobs.sum() / (self.config.sequences_per_step * (ids.shape[1] - 1))


def prepare_study(options: argparse.Namespace) -> None:
    """Write WORK/source, WORK/blocks.safetensors and WORK/study.json."""
    began, work = time.monotonic(), Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(options.source)
    text = token_blocks(encode_documents(read_rows(Path(options.train)), tokenizer), options.sequence)
    model = load_model(options.source, device=options.device, dtype=torch.float32)
    healing = heal(options, model, text) if options.heal_tokens else None
    save_source(options, model, tokenizer, work / "source", healed=healing is not None)
    chats = {
        split: sample(options, model, tokenizer, split, count)
        for split, count in (("train", options.answers), ("heldout", options.heldout_answers))
    }
    chat_blocks = token_blocks(chats["train"], options.sequence)
    heldout = encode_documents(read_rows(Path(options.heldout)), tokenizer)
    train = torch.cat([text, chat_blocks])
    mixed = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    blocks = {
        "train": train,
        "calibration": mixed.flatten()[: min(CALIBRATION_TOKENS, mixed.numel() // 256 * 256)],
        "heldout_text": token_blocks(heldout, HELDOUT_TOKENS)[:HELDOUT_BLOCKS],
        "heldout_samples": token_blocks(chats["heldout"], HELDOUT_TOKENS)[:HELDOUT_BLOCKS],
    }
    save_file({name: rows.to(torch.int32).contiguous() for name, rows in blocks.items()}, work / "blocks.safetensors")
    facts = {
        "source": Path(options.source).name,
        "healing": healing,
        "data": read_card(Path(options.train)).get("name"),
        "tokens": {name: rows.numel() for name, rows in blocks.items()},
        "text_tokens": text.numel(),
        "heldout_topics": HELDOUT_TOPICS,
        "sha256": {name: hashlib.sha256(rows.numpy().tobytes()).hexdigest() for name, rows in blocks.items()},
    }
    (work / "study.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{json.dumps(facts['tokens'])}; {time.monotonic() - began:.0f} s")


def heal(options: argparse.Namespace, model: PreTrainedModel, text: Tensor) -> dict[str, Any]:
    """Train the model in place (fp32 weights); first and last tenth of the losses."""
    cuda = options.device == "cuda"
    config = DistillConfig(
        max_steps=int(options.heal_tokens) // options.batch_tokens,
        tokens_per_step=options.batch_tokens,
        sequence_length=options.sequence,
        micro_batch_size=options.batch_tokens // options.sequence,
        lr=options.heal_lr,
        lr_scheduler="cosine",
        warmup_ratio=0.05,
        precision="bf16" if cuda else "fp32",
        compile="layers" if cuda else "off",
        save_seconds=0,
        save_every=0,
    )
    total = config.max_steps * config.sequences_per_step
    with tempfile.TemporaryDirectory() as scratch:
        ctx = StageContext("heal", config, Path(scratch), seed=1, device=options.device)
        data = OrderedBlocks(text, total, ctx.seed)
        trainer = HealTrainer(ctx, config, model, data, collate, tokens_per_step=options.batch_tokens, whole_rows=True)
        losses = [row["loss"] for row in trainer.fit()]
    model.eval().requires_grad_(False)
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"healed on {config.max_steps * config.tokens_per_step} tokens: loss {first:.3f} -> {last:.3f}")
    return {"tokens": config.max_steps * config.tokens_per_step, "lr": options.heal_lr, "loss": [first, last]}


def save_source(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    healed: bool,
) -> None:
    if healed:
        save_model(model, tokenizer, folder, tokenizer_from=options.source)
    else:
        shutil.copytree(options.source, folder, dirs_exist_ok=True)


def sample(
    options: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str, count: int
) -> list[list[int]]:
    """Token ids of `count` chats: prompt, the source's own answer at temperature 1, EOS. Splits share no topic."""
    topics = TOPICS[:HELDOUT_TOPICS] if split == "heldout" else TOPICS[HELDOUT_TOPICS:]
    questions = [task.format(topic=topic) for topic in topics for task in TASKS]
    turns = [[{"role": "user", "content": questions[number % len(questions)]}] for number in range(count)]
    prompts = [
        tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
        for turn in turns
    ]
    stop = tokenizer.eos_token_id
    settings = Sampling(max_new_tokens=options.answer_tokens, temperature=1.0, seed=len(split), stop=(stop,))
    slots = max(map(len, prompts)) + options.answer_tokens
    engine = DecodeEngine(model, max_rows=min(ROWS, count), max_tokens=slots, share=options.device == "cpu")
    found = engine.generate(prompts, settings)
    rows = zip(prompts, found.tokens, strict=True)
    return [[*prompt, *answer, *([] if answer and answer[-1] == stop else [stop])] for prompt, answer in rows]
