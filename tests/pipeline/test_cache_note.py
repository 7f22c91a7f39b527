"""Both cache figures in the plan: where a stage changes them, with the method card's percentages."""

from __future__ import annotations

import pytest

from posttrain.config import load_recipe
from posttrain.models.architecture import cache_ratios_at, cache_state_bytes
from posttrain.pipeline.plan import make_plan

RELEASED = {
    "llama32_1b": ("[0,5,10,14]", 128, 1280, "3.91%", 12 * 143_360),
    "llama32_3b": ("[0,5,10,16,21,26]", 128, 2304, "2.01%", 22 * 413_696),
    "llama31_8b": ("[0,4,8,12,16,20,25,30]", 160, 3584, "2.73%", 24 * 548_864),
}


def plan(tmp_path, *words: str):
    return make_plan(load_recipe("zebra_llama", [f"paths.outputs={tmp_path}", *words]))


@pytest.mark.parametrize("model", RELEASED)
def test_the_released_hybrids(model: str, tmp_path) -> None:
    layers, rank, per_token, ratio, elements = RELEASED[model]
    rope = 32 if model == "llama32_1b" else 64
    size = [
        "stages.latent.kv_ratio=null",
        f"stages.latent.kv_lora_rank={rank}",
        f"stages.latent.qk_rope_head_dim={rope}",
    ]
    choice = ["~stages.select", "~stages.assemble.inputs.selection", f"stages.assemble.keep={layers}"]
    found = plan(tmp_path, f"model={model}", *size, *choice)
    estimate = found["assemble"].estimate
    assert estimate.cache_bytes_per_token == per_token
    (note,) = [note for note in estimate.notes if note.startswith("cache:")]
    assert f"{per_token:,} B a token" in note and f"{ratio} of plain attention's without the states" in note
    arch = found["assemble"].outputs["model"].architecture
    assert cache_state_bytes(arch, 2, state_size=2) == 2 * elements
    without, lengths = cache_ratios_at(arch)
    assert f"{without:.2%}" == ratio
    assert all(f"{lengths[length]:.1%} at {length // 1024}k" in note for length in (2048, 8192, 32_768, 131_072))
    assert lengths[2048] > lengths[131_072] > without


def test_the_note_stands_where_the_cache_changes_and_the_bytes_everywhere_after(tmp_path) -> None:
    found = plan(tmp_path, "scale=smoke")
    noted = [stage.name for stage in found.stages if any(note.startswith("cache:") for note in stage.estimate.notes)]
    assert noted == ["state", "assemble"]
    bytes_of = {stage.name: stage.estimate.cache_state_bytes for stage in found.stages}
    assert bytes_of["model"] is bytes_of["latent"] is bytes_of["align_latent"] is bytes_of["select"] is None
    assert bytes_of["state"] == bytes_of["align_state"] == 2 * bytes_of["assemble"] > 0
    same = {bytes_of[name] for name in ("assemble", "evaluate_assembled", "distill", "prefer", "evaluate")}
    assert len(same) == 1
    assert found["distill"].to_json()["estimate"]["cache_state_bytes"] == bytes_of["distill"]


def test_models_without_states_are_planned_as_before(tmp_path) -> None:
    found = make_plan(load_recipe("x_ecomla", ["scale=smoke", f"paths.outputs={tmp_path}"]))
    assert all(stage.estimate.cache_state_bytes is None for stage in found.stages)
    assert not any(note.startswith("cache:") for stage in found.stages for note in stage.estimate.notes)
