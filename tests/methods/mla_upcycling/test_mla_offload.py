"""The conversion by layer: the same files as in memory, bit for bit, with little of the model there at a time."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from source_models import make_source
from transformers import AutoModelForCausalLM

from posttrain.cli.live import progress_line
from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.methods.mla_upcycling import memory, offload
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.shape import resolve_shape
from posttrain.methods.mla_upcycling.stage import MlaUpcycle
from posttrain.models import loading
from posttrain.models.inspect import model_meta
from posttrain.models.loading import save_model
from posttrain.models.offloaded import OffloadedModel
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.plan import RUNTIME_BYTES
from posttrain.pipeline.progress import StageState
from posttrain.pipeline.stage import ArtifactMeta

STAGE = MlaUpcycle()
PLANS = {
    "xeco": {"rotary_plan": "xeco", "kv_lora_rank": 16},
    "rorope, attention": {"objective": "attention", "kv_lora_rank": 16},
    "water filling": {"preset": "activation_aware", "kv_ratio": 0.5, "rank_multiple": 1},
    "energy": {"energy": 0.8, "rank_multiple": 4},
    "query": {"kv_lora_rank": 16, "q_lora_rank": 24, "rotary_pairs": "fastest"},
    "search": {"preset": "transmla", "kv_lora_rank": 16},
}


def context(folder: Path, source: Path, offload: str, data: bool = True, **settings) -> StageContext:
    small = {"calibration_tokens": 256, "calibration_sequence_length": 32, "qk_rope_head_dim": 8}
    cfg = MlaUpcycleConfig(**{**small, "offload": offload, **settings})
    text = folder / "data"
    text.mkdir(parents=True, exist_ok=True)
    rows = [{"id": str(index), "text": f"row {index} of a few words " * 40} for index in range(4)]
    (text / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / offload).mkdir(exist_ok=True)
    inputs = {"model": InputArtifact(source, model_meta(source), "model")}
    if data:
        inputs["calibration"] = InputArtifact(text, ArtifactMeta("dataset"), "data.train")
    return StageContext(name="upcycle", config=cfg, work_dir=folder / offload, inputs=inputs)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_equal_folders(whole: Path, layered: Path) -> None:
    ours, theirs = tensors(layered), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype or not ours[name].equal(theirs[name])] == []


def saved(folder: Path, family: str, dtype=None, **changes) -> Path:
    return save_model(make_source(family, **changes), tiny_tokenizer(), folder / "source", dtype=dtype)


@pytest.mark.parametrize(
    ("family", "plan", "changes"),
    [
        *(("llama", plan, {}) for plan in PLANS),
        *(("qwen2", plan, {}) for plan in list(PLANS)[:3]),
        *(("qwen3", plan, {"tie_word_embeddings": False}) for plan in list(PLANS)[:3]),
        ("mistral", "rorope, attention", {"tie_word_embeddings": False}),
    ],
)
def test_by_layer_writes_what_memory_writes(tmp_path, family, plan, changes) -> None:
    source = saved(tmp_path, family, torch.bfloat16 if plan == "energy" else None, **changes)
    whole, layered = (STAGE.run(context(tmp_path, source, how, **PLANS[plan])) for how in ("never", "layers"))
    assert_equal_folders(whole["model"], layered["model"])
    assert_equal_folders(whole["conversion"], layered["conversion"])
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (whole["model"] / name).read_bytes() == (layered["model"] / name).read_bytes(), name
    reports = [json.loads((found["conversion"] / "conversion.json").read_text()) for found in (whole, layered)]
    assert reports[0] == reports[1]
    assert len(list(layered["model"].glob("model-*-of-00003.safetensors"))) == 3
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(found["model"])(ids).logits for found in (whole, layered)]
    assert torch.equal(*logits)


def test_without_text_and_replayed(tmp_path) -> None:
    source = saved(tmp_path, "llama")
    whole = STAGE.run(context(tmp_path, source, "never", data=False, kv_lora_rank=16))
    layered = STAGE.run(context(tmp_path, source, "layers", data=False, kv_lora_rank=16))
    assert_equal_folders(whole["model"], layered["model"])
    ctx = context(tmp_path / "again", source, "layers", data=False, kv_lora_rank=16)
    ctx.config = MlaUpcycleConfig(plan=str(whole["conversion"]), offload="layers")
    assert_equal_folders(whole["model"], STAGE.run(ctx)["model"])


def live_bytes() -> int:
    """Of every tensor that holds memory on the host."""
    seen = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_few_layers_are_there_at_a_time(tmp_path, monkeypatch) -> None:
    """12 layers; wide feed-forward parts, so that weights outweigh moments and text."""
    source = saved(tmp_path, "llama", num_hidden_layers=12, intermediate_size=3072)
    layer = 4 * (3 * 64 * 3072 + 4 * 64 * 64)
    ctx = context(tmp_path, source, "layers", kv_lora_rank=16)
    gc.collect()
    before, peaks = live_bytes(), []
    for where, name in ((offload, "layer_statistics"), (offload, "write_tensors"), (loading, "save_file")):
        kept = getattr(where, name)

        def watched(*args, kept=kept, **kwargs):
            found = kept(*args, **kwargs)
            peaks.append(live_bytes() - before)
            return found

        monkeypatch.setattr(where, name, watched)
    STAGE.run(ctx)
    assert len(peaks) == 37 and layer < max(peaks) < 3 * layer


@pytest.mark.parametrize("units", [1, 3, 5, 7], ids=["calibrating", "spectra", "planning", "writing"])
def test_a_stop_in_every_phase_and_an_undisturbed_second_attempt(tmp_path, units) -> None:
    source = saved(tmp_path, "llama")
    ctx = context(tmp_path, source, "layers", **PLANS["water filling"])
    ctx.progress = lambda done, total, **_: (ctx.work_dir / "STOP").touch() if done == units else None
    with pytest.raises(StopRequested):
        STAGE.run(ctx)
    assert not list((ctx.work_dir / "outputs" / "model").iterdir())
    (ctx.work_dir / "STOP").unlink()
    again = context(tmp_path, source, "layers", **PLANS["water filling"])
    whole = STAGE.run(context(tmp_path, source, "never", **PLANS["water filling"]))
    assert_equal_folders(whole["model"], STAGE.run(again)["model"])
    assert sorted(path.name for path in again.work_dir.iterdir()) == ["outputs"]
    assert sorted(path.name for path in (again.work_dir / "outputs").iterdir()) == ["conversion", "model"]


@pytest.mark.parametrize(("plan", "passes"), [("rorope, attention", 3), ("water filling", 4), ("energy", 4)])
@pytest.mark.parametrize("offload", ["layers", "never"])
def test_progress_counts_layers_to_the_end(tmp_path, offload, plan, passes) -> None:
    """In memory calibration is counted in batches, of which there are two as well."""
    ctx = context(tmp_path, saved(tmp_path, "llama"), offload, **PLANS[plan])
    seen, state = [], StageState("upcycle")
    ctx.progress = lambda done, total, unit="step", **_: seen.append((done, total))
    STAGE.run(ctx)
    assert seen == [(count, 2 * passes) for count in range(1, 2 * passes + 1)]
    for time, (done, total) in enumerate(seen[:-2]):
        state.update({"event": "progress", "time": time, "done": done, "total": total, "unit": "step"})
    assert progress_line(state) == f"upcycle  step {2 * passes - 2}/{2 * passes}  1/s  ETA 2s"


def test_a_tensor_that_cannot_be_read_is_named_with_its_file(tmp_path) -> None:
    source = OffloadedModel(saved(tmp_path, "llama"))
    file = tmp_path / "source" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(StageError, match="cannot be read") as caught:
        source.tensor("model.layers.1.mlp.up_proj.weight")
    assert str(file) in str(caught.value)


def test_a_truncated_shard_is_named_before_anything_is_read(tmp_path) -> None:
    source = tmp_path / "source"
    save_model(make_source("llama"), tiny_tokenizer(), source, max_shard_size="60KB")
    ctx = context(tmp_path, source, "layers", kv_lora_rank=16)
    file = sorted(source.glob("*.safetensors"))[-1]
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(RecipeError, match="truncated") as caught:
        STAGE.run(ctx)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value).split("\n  at: ")[0]
    assert not (ctx.work_dir / "statistics").exists()


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("wrong", "change"),
    [
        (f"missing: {UP}", lambda state: state.pop(UP)),
        (f"of another shape: {UP}", lambda state: state.update({UP: torch.ones(3, 64)})),
        ("unexpected: model.layers.1.more", lambda state: state.update({"model.layers.1.more": torch.ones(3)})),
    ],
)
def test_foreign_weights_are_refused_before_any_layer(tmp_path, wrong, change) -> None:
    file = saved(tmp_path, "llama") / "model.safetensors"
    change(state := load_file(file))
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match=wrong):
        OffloadedModel(tmp_path / "source")


def test_files_beside_the_model_are_not_read_and_a_tied_weight_may_have_either_name(tmp_path) -> None:
    source = saved(tmp_path, "llama")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    save_file({"of.another.model": torch.ones(3)}, source / "other.safetensors")
    whole, layered = (STAGE.run(context(tmp_path, source, how, kv_lora_rank=16)) for how in ("never", "layers"))
    assert_equal_folders(whole["model"], layered["model"])


def test_the_plan_shows_what_layers_cost_instead_of_memory(tmp_path) -> None:
    source = saved(tmp_path, "llama", num_hidden_layers=12, intermediate_size=3072)
    found = {}
    for how in ("never", "layers"):
        ctx = context(tmp_path, source, how, **PLANS["water filling"])
        found[how] = STAGE.estimate(ctx.config, {name: given.meta for name, given in ctx.inputs.items()})
    whole, layered = found["never"], found["layers"]
    assert sum(layered.memory.values()) < sum(whole.memory.values()) / 3
    assert layered.memory["plan"] == whole.memory["plan"] > 0
    moments = 12 * 8 * (64 * 64 + 64)
    assert layered.disk_bytes - whole.disk_bytes == moments
    (note,) = set(layered.notes) - set(whole.notes)
    assert note.startswith("converted by layer (offload=layers): the source is read 4 times")
    STAGE.run(ctx)
    plan = ctx.work_dir / "outputs" / "conversion" / "plan.safetensors"
    assert sum(tensor.nbytes for tensor in load_file(plan).values()) < 1.1 * layered.memory["plan"]


def test_statistics_files_are_as_large_as_planned(tmp_path) -> None:
    for family in ("llama", "qwen3"):
        ctx = context(tmp_path / family, saved(tmp_path / family, family), "layers", kv_lora_rank=16)
        shape = resolve_shape(ctx.inputs["model"].meta.architecture, ctx.config)
        source = OffloadedModel(ctx.inputs["model"].path)
        offload.collect_by_layer(source, [torch.arange(32)[None]], ctx.work_dir / "statistics")
        size = sum(t.nbytes for file in (ctx.work_dir / "statistics").iterdir() for t in load_file(file).values())
        assert size == memory.stored_statistics_bytes(shape)


def test_auto_goes_by_layer_where_memory_is_short(tmp_path, monkeypatch) -> None:
    source = saved(tmp_path, "llama", num_hidden_layers=12, intermediate_size=3072)
    ctx = context(tmp_path, source, "auto", kv_lora_rank=16)
    metas = {name: given.meta for name, given in ctx.inputs.items()}
    whole = STAGE.estimate(ctx.config, metas).memory
    assert memory.HIDDEN_STATES not in whole
    room = sum(whole.values()) + RUNTIME_BYTES
    monkeypatch.setattr(memory, "planned_memory", lambda: room)
    assert STAGE.estimate(ctx.config, metas).memory == whole
    monkeypatch.setattr(memory, "planned_memory", lambda: room - 1)
    short = STAGE.estimate(ctx.config, metas).memory
    assert memory.HIDDEN_STATES in short and sum(short.values()) < sum(whole.values()) / 4
    assert len(list(STAGE.run(ctx)["model"].glob("model-*.safetensors"))) == 13
    never = MlaUpcycleConfig(**{**ctx.config.model_dump(), "offload": "never"})
    assert STAGE.estimate(never, metas).memory == whole
    assert never.key_fields() == ctx.config.key_fields()
