"""Packed documents: rows hold every token once, and training on them is training on the documents one by one."""

from __future__ import annotations

import pytest
import torch
from distillation_world import STAGE, context, outcome, uneven, world
from source_models import make_source
from text_data import write_dataset

from posttrain.errors import RecipeError, StageError
from posttrain.methods.distillation import DistillConfig, distillation_loss
from posttrain.methods.distillation.data import OrderedPacks, collate_packs
from posttrain.methods.distillation.loss import IGNORE
from posttrain.methods.distillation.models import add_adapters, hidden_states
from posttrain.methods.distillation.packing import pack_documents
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.training.adapters import LoraSettings

__all__ = ["context", "uneven", "world"]  # fixtures

LENGTHS = (5, 30, 1, 17, 12, 1, 70, 9, 32, 3)


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (size,), generator=generator).tolist() for size in LENGTHS]


def segments(rows) -> list[list[int]]:
    """The pieces of all rows, read back from positions and counts."""
    found = []
    for ids, positions, real in zip(rows.ids, rows.positions, rows.real, strict=True):
        for token, position in zip(ids[:real].tolist(), positions[:real].tolist(), strict=True):
            if position == 0:
                found.append([])
            assert position == len(found[-1])
            found[-1].append(token)
    return found


def test_rows_hold_every_piece_once_and_whole():
    rows = pack_documents(documents(), 32, pad=299)
    pieces = [document[i : i + 32] for document in documents() for i in range(0, len(document), 32)]
    assert sorted(segments(rows)) == sorted(pieces)
    assert rows.real.sum() == sum(LENGTHS) and rows.pieces.sum() == len(pieces) == len(LENGTHS) + 2
    assert len(rows.ids) == -(-sum(LENGTHS) // 32) and rows.waste == pytest.approx(1 - sum(LENGTHS) / (6 * 32))
    assert all((ids[real:] == 299).all() for ids, real in zip(rows.ids, rows.real, strict=True))


def test_best_fit_takes_the_fullest_row_that_holds_it():
    rows = pack_documents([[1] * 6, [2] * 8, [3] * 2, [4] * 4], 10, pad=0)
    assert [sorted(set(ids.tolist())) for ids in rows.ids] == [[2, 3], [1, 4]] and rows.waste == 0


def student(kind: str):
    """`llama`, `eager` or `upcycled` (latent attention); with `+lora`, adapters that are no longer zero."""
    kind, _, adapters = kind.partition("+")
    if kind == "upcycled":
        from posttrain.methods.mla_upcycling import upcycle

        settings = {"kv_lora_rank": 24, "qk_rope_head_dim": 8}
        calibration = [torch.randint(0, 250, (2, 64), generator=torch.Generator().manual_seed(9))]
        model = upcycle(make_source("llama", seed=1, attn_implementation="sdpa"), settings, calibration)[0]
    else:
        model = make_source("llama", seed=1, attn_implementation="eager" if kind == "eager" else "sdpa")
    if adapters:
        model = add_adapters(model, LoraSettings(r=4), seed=0)
        generator = torch.Generator().manual_seed(8)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def loss_and_gradients(model, teacher, batches):
    """Σ over batches of 0.7 KL + 0.3 CE, divided by the totals that each batch names, and the gradients."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        places = batch.get("position_ids")
        with torch.no_grad():
            teacher_h = hidden_states(teacher, batch["input_ids"], places)
        loss = distillation_loss(
            hidden_states(model, batch["input_ids"], places),
            model.get_output_embeddings().weight,
            teacher_h,
            teacher.get_output_embeddings().weight,
            batch.get("mask"),
            tokens=batch["step_tokens"],
            labels=batch["labels"],
            ce_weight=0.3,
            label_tokens=batch["step_labels"],
        ).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "eager", "upcycled", "llama+lora", "upcycled+lora"])
def test_packed_rows_equal_the_documents_one_by_one(kind):
    """With adapters: also of a model that carries them, whose gradients are the adapters' alone."""
    model, teacher = student(kind).train(), make_source("qwen2", seed=2, attn_implementation="sdpa")
    rows = pack_documents(documents(), 32, pad=257)
    data = OrderedPacks(rows, len(rows.ids), seed=0, rows_per_step=len(rows.ids))
    packed = [collate_packs([data[i] for i in range(first, first + 2)]) for first in range(0, len(rows.ids), 2)]
    pieces = segments(rows)
    tokens, labelled = sum(map(len, pieces)), sum(len(piece) - 1 for piece in pieces)
    alone = [
        {
            "input_ids": torch.tensor([piece]),
            "labels": torch.tensor([[*piece[1:], IGNORE]]),
            "step_tokens": tokens,
            "step_labels": labelled,
        }
        for piece in pieces
    ]
    loss, gradients = loss_and_gradients(model, teacher, packed)
    expected, wanted = loss_and_gradients(model, teacher, alone)
    assert expected > 0.1 and loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == wanted.keys() and len(gradients) >= 8
    assert "lora" not in kind or all(".lora_" in name for name in gradients)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * largest, name


def test_results_count_real_tokens_and_report_the_padding(context, uneven):
    history, result = outcome(context(data=uneven, packing="documents", max_steps=3))[1:]
    assert 0 < result["padding"] < 0.5 and 0 < result["tokens"] < 3 * 128
    assert all(row["loss"] == pytest.approx(row["kl"], rel=1e-5) for row in history)
    stream = outcome(context("stream", data=uneven, max_steps=3))[2]
    assert "padding" not in stream and stream["tokens"] == 3 * 128


def test_packed_run_resumes_exactly(context, uneven):
    from posttrain.errors import StopRequested

    whole = outcome(context("whole", data=uneven, packing="documents"))
    ctx, calls = context("parts", data=uneven, packing="documents"), []
    ctx.should_stop = lambda: calls.append(1) or len(calls) > 2
    with pytest.raises(StopRequested):
        STAGE.run(ctx)
    again = outcome(context("parts", data=uneven, packing="documents"))
    assert again[1:] == whole[1:] and all(torch.equal(again[0][name], whole[0][name]) for name in whole[0])


def test_no_documents(context, tmp_path):
    with pytest.raises(StageError, match="no documents"):
        STAGE.run(context(data=write_dataset(tmp_path / "none", []), packing="documents"))


def test_keys_of_stream_are_those_from_before():
    assert "packing" not in DistillConfig().key_fields() and "teacher_device" not in DistillConfig().key_fields()
    assert DistillConfig(packing="documents").key_fields()["packing"] == "documents"


def test_teacher_on_a_named_device_gives_the_same(context):
    same, cpu = (outcome(context(name, teacher_device=name, max_steps=2)) for name in ("same", "cpu"))
    assert same[1] == cpu[1]


def test_a_teacher_device_that_is_not_there_is_one_error(context):
    from posttrain.pipeline.device import planning_for

    with pytest.raises(StageError, match="there is no cuda:64"):
        STAGE.run(context(teacher_device="cuda:64"))
    metas = {name: ArtifactMeta(spec.type) for name, spec in STAGE.inputs.items()}
    with planning_for("cpu"), pytest.raises(RecipeError, match="without a GPU"):
        STAGE.check(DistillConfig(teacher_device="cuda:0"), metas)
    with planning_for("cuda"):
        STAGE.check(DistillConfig(teacher_device="cuda:0"), metas)
    with pytest.raises(ValueError, match="teacher_device"):
        DistillConfig(teacher_device="gpu")


def test_the_stages_first_step_is_that_of_its_documents_one_by_one(context, uneven, world):
    from posttrain.methods.distillation.data import read_packs
    from posttrain.models.loading import load_model, load_tokenizer

    history = outcome(context(data=uneven, packing="documents", max_steps=1))[1]
    rows = read_packs(uneven, load_tokenizer(world / "student"), 32)
    data = OrderedPacks(rows, 4, seed=3, rows_per_step=4)
    places = [data.place(index) for index in range(4)]
    pieces = segments(type(rows)(*(tensor[places] for tensor in rows)))
    models = [load_model(world / name) for name in ("student", "teacher")]
    kl_sum = 0.0
    with torch.no_grad():
        for piece in pieces:
            student, teacher = (model(torch.tensor([piece])).logits.double().log_softmax(-1) for model in models)
            kl_sum += (teacher.exp() * (teacher - student)).sum().item()
    assert any(len(piece) < 32 for piece in pieces) and rows.real[places].sum() < 4 * 32
    assert history[0]["loss"] == pytest.approx(kl_sum / sum(map(len, pieces)), rel=1e-5)
