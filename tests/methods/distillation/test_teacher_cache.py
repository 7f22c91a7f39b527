"""Training on a teacher's kept tokens: what is written, that training equals the live teacher, and interruptions."""

from __future__ import annotations

import json

import pytest
import torch
from distillation_world import SMALL, STAGE, assert_same, context, outcome, uneven, world
from pydantic import ValidationError
from safetensors.torch import load_file
from source_models import make_source
from text_data import words, write_dataset

from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.methods.distillation import DistillConfig, teacher_cache, teacher_pass
from posttrain.models.architecture import normalise
from posttrain.pipeline.stage import ArtifactMeta

__all__ = ["context", "uneven", "world"]  # fixtures

CACHED = {"teacher_cache": {"top_k": 8}}
EXACT = {"teacher_cache": {"top_k": 300, "dtype": "float32"}}


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    """Two sequences a shard at top_k 8 in float16."""
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 2 * 32 * (8 * 6 + 2))


def folder(ctx):
    return ctx.work_dir / "teacher_cache"


def sizes(ctx):
    return {path.name: path.stat().st_size for path in sorted(folder(ctx).glob("shard-*"))}


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0, "ce_weight": 0.3, "reduction": "batch_sum"}])
def test_all_tokens_kept_train_as_the_live_teacher(context, uneven, packing, changes):
    common = {"data": uneven, "packing": packing, "adam_epsilon": 1e-3, "max_steps": 4, **changes}
    live, cached = outcome(context("live", **common)), outcome(context("cached", **common, **EXACT))
    for row, other in zip(live[1], cached[1], strict=True):
        assert row.keys() == other.keys()
        assert all(row[name] == pytest.approx(other[name], rel=1e-5) for name in row)
    assert max((live[0][name] - cached[0][name]).abs().max() for name in live[0]) <= 1e-6
    assert live[2] | {"teacher_top_k_mass": 1.0} == pytest.approx(cached[2], rel=1e-5)


def test_few_tokens_learn_and_give_less_divergence(context):
    live, cached = outcome(context("live")), outcome(context("cached", **CACHED))
    assert cached[1][-1]["kl"] < cached[1][0]["kl"] < live[1][0]["kl"]


@pytest.mark.parametrize(("max_steps", "distinct"), [(5, 10), (2, 8)])
def test_each_sequence_is_read_once_and_the_teacher_not_called_again(
    context, world, tmp_path, monkeypatch, max_steps, distinct
):
    """Five steps use 10 sequences twice; two steps use 8 of them."""
    rows, calls, original = [], [], teacher_pass.hidden_states

    def counting(model, ids, positions=None):
        rows.extend(map(tuple, ids.tolist()))
        return original(model, ids, positions)

    data = write_dataset(tmp_path / "data", words(5))
    monkeypatch.setattr(teacher_pass, "hidden_states", counting)
    monkeypatch.setattr(
        "posttrain.methods.distillation.trainer.hidden_states", lambda *a: calls.append(a[0]) or original(*a)
    )
    ctx = context(data=data, max_steps=max_steps, **CACHED)
    outcome(ctx)
    assert len(rows) == len(set(rows)) == distinct
    assert {type(model).__name__ for model in calls} == {"LlamaForCausalLM"}  # the student; the teacher is a Qwen2
    assert len(calls) == max_steps * 2
    done = json.loads((folder(ctx) / "COMPLETE").read_text())
    assert done["files"] == sizes(ctx) and len(done["files"]) == -(-distinct // 2)
    found = load_file(folder(ctx) / "shard-00000.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == {
        "ids": ((2, 32, 8), torch.int32),
        "logprobs": ((2, 32, 9), torch.float16),
    }


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_the_mass_kept_is_the_mean_over_trained_tokens(context, world, uneven, packing):
    from posttrain.methods.distillation.data import read_packs
    from posttrain.methods.distillation.packing import PackedRows
    from posttrain.models.loading import load_model, load_tokenizer
    from posttrain.training.blocks import read_blocks

    ctx = context(data=uneven, packing=packing, temperature=1.5, max_steps=8, **CACHED)
    mass = outcome(ctx)[2]["teacher_top_k_mass"]
    read = read_packs if packing == "documents" else read_blocks
    blocks = read(uneven, load_tokenizer(world / "student"), 32)
    teacher = load_model(world / "teacher")
    if packing == "documents":
        assert isinstance(blocks, PackedRows) and blocks.waste > 0
        options = [
            {"input_ids": i[None].long(), "position_ids": p[None].long()} for i, p in zip(*blocks[:2], strict=True)
        ]
        real = blocks.real.tolist()
    else:
        options, real = [{"input_ids": row[None]} for row in blocks], [32] * len(blocks)
    with torch.no_grad():
        kept = [
            (teacher(**batch, use_cache=False).logits[0, :count].double() / 1.5).softmax(-1).topk(8).values.sum(-1)
            for batch, count in zip(options, real, strict=True)
        ]
    assert 0.05 < mass < 0.95 and mass == pytest.approx(torch.cat(kept).mean().item(), rel=1e-5)


class Killed(BaseException):
    """Stands for a kill: no handler for errors may see it."""


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    from posttrain.pipeline.context import InputArtifact, StageContext

    inputs = {name: InputArtifact(world / name, ArtifactMeta(type=spec.type)) for name, spec in STAGE.inputs.items()}
    work = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "SHARD_BYTES", 2 * 32 * (8 * 6 + 2))
        return outcome(StageContext("distill", DistillConfig(**SMALL, **CACHED), work, inputs, seed=3))


@pytest.mark.parametrize("name", ["save_file", "sync_file", "os.replace", "write_json"])
def test_killed_while_writing_goes_on_after_the_last_whole_shard(undisturbed, context, monkeypatch, name):
    """Killed in the third shard, or before the marker; the shards before are not computed again."""
    owner = teacher_cache.os if "." in name else teacher_cache
    attribute = name.split(".")[-1]
    original, calls = getattr(owner, attribute), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == (1 if name == "write_json" else 3):
            if name == "save_file":
                args[1].write_bytes(b"half")
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, deadly)
        with pytest.raises(Killed):
            STAGE.run(context(**CACHED))
    ctx = context(**CACHED)
    before = {path.name: path.stat().st_mtime_ns for path in folder(ctx).glob("shard-*")}
    assert len(before) == (10 if name == "write_json" else 2) and not (folder(ctx) / "COMPLETE").exists()
    assert_same(undisturbed, outcome(ctx))
    after = {path.name: path.stat().st_mtime_ns for path in folder(ctx).glob("*.safetensors")}
    assert len(after) == 10 and all(after[shard] == time for shard, time in before.items())
    assert not list(folder(ctx).glob(".*"))


def test_stopped_in_the_pass_and_in_training_changes_nothing(undisturbed, context, monkeypatch):
    """Asked to stop at every seventh look: in the pass, then at each few steps."""
    asked, stops, result = [], 0, None
    monkeypatch.setattr(
        "posttrain.pipeline.context.StageContext.should_stop", lambda self: asked.append(1) or len(asked) % 4 == 0
    )
    while result is None:
        try:
            result = outcome(context(**CACHED))
        except StopRequested:
            stops += 1
    assert stops >= 4
    assert_same(undisturbed, result)


def test_a_complete_cache_needs_no_teacher(undisturbed, context, monkeypatch):
    ctx = context(**CACHED)
    outcome(ctx)
    monkeypatch.setattr("posttrain.methods.distillation.stage._load_teacher", lambda *_: pytest.fail("loaded"))
    assert_same(undisturbed, outcome(context(**CACHED)))


@pytest.mark.parametrize("damage", ["size", "header"])
def test_a_damaged_shard_is_computed_again(undisturbed, context, damage, caplog):
    ctx = context(**CACHED)
    outcome(ctx)
    path = folder(ctx) / "shard-00004.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-5] if damage == "size" else b"\0" * 8 + content[8:])
    (ctx.work_dir / "checkpoints").rename(ctx.work_dir / "old")
    if damage == "header":
        (folder(ctx) / "COMPLETE").unlink()
    assert_same(undisturbed, outcome(context(**CACHED)))
    assert path.read_bytes() == content and "1 shards of the teacher's cache" in caplog.text


@pytest.mark.parametrize("change", ["teacher", "data", {"temperature": 1.5}], ids=str)
def test_another_teacher_text_or_setting_never_meets_an_old_cache(context, tmp_path, change, caplog):
    """The same work folder with something changed gives what a fresh folder gives."""
    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    changes = change if isinstance(change, dict) else {}
    if change == "teacher":
        save_model(make_source("llama", seed=7), tiny_tokenizer(), tmp_path / "other")
        changes = {"teacher": tmp_path / "other"}
    elif change == "data":
        changes = {"data": write_dataset(tmp_path / "other", words(20, seed=9))}
    changes = {"max_steps": 2, **CACHED, **changes}
    fresh = outcome(context("fresh", **changes))
    ctx = context("used", max_steps=2, **CACHED)
    outcome(ctx)
    (ctx.work_dir / "checkpoints").rename(ctx.work_dir / "old")
    assert_same(fresh, outcome(context("used", **changes)))
    assert "of another teacher, text or setting" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_dtype": "bfloat16"},
        {"teacher_cache": {"top_k": 8, "dtype": "bfloat16"}},
        {"teacher_cache": {"top_k": 9}},
        {"precision": "bf16"},
        {"packing": "documents"},
    ],
    ids=str,
)
def test_what_decides_the_kept_values_is_in_the_identity(context, change):
    def identity(**changes):
        ctx = context(**{**CACHED, **changes})
        return teacher_pass._settings(ctx, ctx.config)

    assert identity() == identity(micro_batch_size=1, lr=1e-5) != identity(**change)


def test_the_shape_of_what_is_read_is_in_the_identity():
    ids = torch.arange(12, dtype=torch.int32)
    shapes = ((2, 6), (3, 4), (12,))
    assert len({teacher_cache.identity_of({}, {"tokens": ids.view(*shape)})["tokens"] for shape in shapes}) == 3


def test_a_full_disk_is_noticed_before_the_pass(context, monkeypatch):
    monkeypatch.setattr(teacher_pass.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**4})())
    ctx = context(**CACHED)
    with pytest.raises(StageError, match="teacher's cache needs"):
        STAGE.run(ctx)
    assert not folder(ctx).exists()


def test_models_that_do_not_fit_are_noticed_before_the_pass(context, tmp_path):
    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    save_model(make_source("llama", vocab_size=320), tiny_tokenizer(), tmp_path / "padded")
    ctx = context(teacher=tmp_path / "padded", **CACHED)
    with pytest.raises(StageError, match="300 and 320"):
        STAGE.run(ctx)
    assert not sizes(ctx)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_other_divergences_are_refused_with_the_reason(divergence):
    with pytest.raises(ValidationError, match="probability of every token that the student may give"):
        DistillConfig(divergence=divergence, **CACHED)


def metas():
    arch = normalise(make_source("llama").config.to_dict())
    model = ArtifactMeta("model", architecture=arch, tokenizer="a" * 64)
    return {"student": model, "teacher": model, "data": ArtifactMeta("dataset", rows=10, tokens=5000)}


def test_more_tokens_than_the_vocabulary_are_refused_by_the_plan():
    STAGE.check(DistillConfig(**SMALL, **EXACT), metas())
    with pytest.raises(RecipeError, match=r"(?s)301 tokens of a vocabulary of 300.*teacher_cache.top_k=300"):
        STAGE.check(DistillConfig(**SMALL, teacher_cache={"top_k": 301}), metas())


@pytest.mark.parametrize(("max_steps", "tokens"), [(10, 1280), (1000, 5000)])
def test_plan_counts_the_caches_disk_and_no_teacher_in_training(max_steps, tokens):
    fields = {**SMALL, "max_steps": max_steps}
    live, cached = (STAGE.estimate(DistillConfig(**fields, **more), metas()) for more in ({}, CACHED))
    assert cached.disk_bytes - live.disk_bytes == tokens * (8 * 6 + 2)
    assert "teacher" in live.memory and "teacher" not in cached.memory
    assert any("teacher's cache" in note for note in cached.notes) and not live.notes
    wide = {**metas()["teacher"].architecture, "num_hidden_layers": 40}
    large = {**metas(), "teacher": ArtifactMeta("model", architecture=wide)}
    passing = STAGE.estimate(DistillConfig(**fields, **CACHED), large).memory
    assert set(passing) == {"weights", "logits", "teacher"}  # the pass before training is the peak


def test_the_key_holds_the_cache_only_when_there_is_one():
    assert "teacher_cache" not in DistillConfig().key_fields() and "lora" not in DistillConfig().key_fields()
    assert DistillConfig(**CACHED).key_fields()["teacher_cache"] == {"top_k": 8, "dtype": "float16"}


def test_a_sequence_that_is_not_there_is_an_error(context):
    ctx = context(max_steps=1, **CACHED)
    outcome(ctx)
    rows = torch.tensor([1, 4, 6, 9])
    cache = teacher_cache.TopKCache(folder(ctx), rows, 2)
    stored = load_file(folder(ctx) / "shard-00001.safetensors")
    assert torch.equal(cache[6].ids, stored["ids"][0]) and torch.equal(cache[9].logprobs, stored["logprobs"][1])
    for row in (0, 5, 10):
        with pytest.raises(IndexError, match=f"sequence {row}"):
            cache[row]
