"""The conversion by layer: the same files as in memory, bit for bit, with little of the model there at a time."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from source_models import make_source
from transformers import AutoModelForCausalLM

from posttrain.errors import StageError, StopRequested
from posttrain.methods.mla_upcycling import memory, offload
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.stage import MlaUpcycle
from posttrain.models.inspect import model_meta
from posttrain.models.loading import save_model
from posttrain.models.offloaded import OffloadedModel
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.context import InputArtifact, StageContext
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
        ("qwen2", "rorope, attention", {}),
        ("qwen3", "water filling", {"tie_word_embeddings": False}),
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
    for name in ("layer_statistics", "write_tensors"):
        kept = getattr(offload, name)

        def watched(*args, kept=kept, **kwargs):
            found = kept(*args, **kwargs)
            peaks.append(live_bytes() - before)
            return found

        monkeypatch.setattr(offload, name, watched)
    STAGE.run(ctx)
    assert len(peaks) == 24 and layer < max(peaks) < 3 * layer


def test_a_stop_between_layers_and_an_undisturbed_second_attempt(tmp_path) -> None:
    source = saved(tmp_path, "llama")
    ctx = context(tmp_path, source, "layers", kv_lora_rank=16)
    (ctx.work_dir / "STOP").touch()
    with pytest.raises(StopRequested):
        STAGE.run(ctx)
    (ctx.work_dir / "STOP").unlink()
    whole = STAGE.run(context(tmp_path, source, "never", kv_lora_rank=16))
    assert_equal_folders(whole["model"], STAGE.run(ctx)["model"])
    assert not (ctx.work_dir / "statistics").exists()


def test_progress_counts_layers_to_the_end(tmp_path) -> None:
    ctx = context(tmp_path, saved(tmp_path, "llama"), "layers", kv_lora_rank=16)
    seen = []
    ctx.progress = lambda done, total, unit="step", **_: seen.append((done, total))
    STAGE.run(ctx)
    assert seen == [(count, 6) for count in range(1, 7)]


def test_a_tensor_that_cannot_be_read_is_named_with_its_file(tmp_path) -> None:
    source = OffloadedModel(saved(tmp_path, "llama"))
    file = tmp_path / "source" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(StageError, match="cannot be read") as caught:
        source.tensor("model.layers.1.mlp.up_proj.weight")
    assert str(file) in str(caught.value)


def test_auto_goes_by_layer_where_memory_is_short(tmp_path, monkeypatch) -> None:
    source = saved(tmp_path, "llama", num_hidden_layers=12, intermediate_size=3072)
    ctx = context(tmp_path, source, "auto", kv_lora_rank=16)
    metas = {name: given.meta for name, given in ctx.inputs.items()}
    whole = STAGE.estimate(ctx.config, metas).memory
    assert memory.HIDDEN_STATES not in whole
    monkeypatch.setattr(memory, "planned_memory", lambda: sum(whole.values()) - 1)
    short = STAGE.estimate(ctx.config, metas).memory
    assert memory.HIDDEN_STATES in short and sum(short.values()) < sum(whole.values()) / 4
    assert len(list(STAGE.run(ctx)["model"].glob("model-*.safetensors"))) == 13
    never = MlaUpcycleConfig(**{**ctx.config.model_dump(), "offload": "never"})
    assert STAGE.estimate(never, metas).memory == whole
    assert never.key_fields() == ctx.config.key_fields()
