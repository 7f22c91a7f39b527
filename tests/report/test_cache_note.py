"""Both cache figures in the plan: section 8 of the method card as printed, once where a stage changes them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from source_models import make_source

from posttrain.config import load_recipe
from posttrain.methods.hybrid_ssm import hybridize
from posttrain.models.architecture import LENGTHS
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.plan_text import render
from posttrain.pipeline.stage import Estimate
from posttrain.report.cache_note import with_states

RELEASED = [
    # model, kept layers, rank, rotary width, B/token, B/sequence, without states, with them at 2k/8k/32k/128k
    ("llama32_1b", [0, 5, 10, 14], 128, 32, 1_280, 6_586_368, "3.91%", ("13.7%", "6.4%", "4.5%", "4.1%")),
    ("llama32_1b", range(0, 16, 2), 128, 32, 2_560, 4_390_912, "7.81%", ("14.4%", "9.4%", "8.2%", "7.9%")),
    ("llama32_3b", [0, 5, 10, 16, 21, 26], 128, 64, 2_304, 35_504_128, "2.01%", ("17.1%", "5.8%", "3.0%", "2.2%")),
    ("llama32_3b", range(0, 28, 2), 128, 64, 5_376, 22_593_536, "4.69%", ("14.3%", "7.1%", "5.3%", "4.8%")),
    (
        "llama31_8b",
        [0, 4, 8, 12, 16, 20, 25, 30],
        160,
        64,
        3_584,
        51_511_296,
        "2.73%",
        ("21.9%", "7.5%", "3.9%", "3.0%"),
    ),
    ("llama31_8b", range(0, 32, 2), 160, 64, 7_168, 34_340_864, "5.47%", ("18.3%", "8.7%", "6.3%", "5.7%")),
]
"""By hand from the card's formulas, with elements of two bytes and states of four (the card prints two and two)."""


def plan(tmp_path, *words: str):
    return make_plan(load_recipe("zebra_llama", [f"paths.outputs={tmp_path}", *words]))


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: f"{row[0]} {len(row[1])}")
def test_the_released_hybrids(row: tuple, tmp_path) -> None:
    model, kept, rank, rope, per_token, constant, without, honest = row
    latent = ("kv_ratio=null", f"kv_lora_rank={rank}", f"qk_rope_head_dim={rope}")
    choice = ("~stages.select", "~stages.assemble.inputs.selection", f"stages.assemble.keep={list(kept)}")
    found = plan(tmp_path, f"model={model}", *(f"stages.latent.{words}" for words in latent), *choice)
    lengths = ", ".join(f"{ratio} at {name}" for ratio, name in zip(honest, ("2k", "8k", "32k", "128k"), strict=True))
    assert (
        f"  assemble: cache: {per_token:,} B a token and {constant:,} B a sequence, states in fp32: {without} of plain "
        f"attention's without the states (what papers print); with them {lengths} tokens\n"
    ) in render(found)
    figures = json.loads(json.dumps(found.to_json()["stages"]))[found.stages.index(found["distill"])]["estimate"]
    assert figures["cache_bytes_per_token"] == per_token and figures["cache_state_bytes"] == constant
    assert f"{figures['cache_ratio_without_states']:.2%}" == without
    assert list(figures["cache_ratio_with_states"]) == [str(length) for length in LENGTHS]
    assert tuple(f"{ratio:.1%}" for ratio in figures["cache_ratio_with_states"].values()) == honest


def test_the_note_stands_where_the_cache_changes_and_the_bytes_everywhere_after(tmp_path) -> None:
    found = plan(tmp_path, "scale=smoke")
    noted = [stage.name for stage in found.stages if any(note.startswith("cache:") for note in stage.estimate.notes)]
    assert noted == ["state", "assemble"]
    bytes_of = {stage.name: stage.estimate.cache_state_bytes for stage in found.stages}
    assert bytes_of["model"] is bytes_of["latent"] is bytes_of["align_latent"] is bytes_of["select"] is None
    # A layer of 4 heads of 16 over 2 shared ones: 4·16² elements of state in fp32, 4 columns of 128 channels in bf16.
    assert bytes_of["state"] == bytes_of["align_state"] == 2 * (4 * 16**2 * 4 + 4 * 128 * 2)
    after = ("assemble", "evaluate_assembled", "distill", "prefer", "evaluate")
    assert {bytes_of[name] for name in after} == {bytes_of["state"] // 2}
    table = render(found).split("\n\n")[1]
    rows = {line.split()[0]: line for line in table.splitlines()}
    assert all(" 64 B + 5.1 kB/seq " in rows[name] for name in after)
    assert " 128 B  " in rows["latent"] and "/seq" not in rows["latent"]


def test_the_folder_of_a_hybrid_is_noted_where_it_comes_in(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    hybridize(make_source("llama"), ["mamba2", "full_attention"]).save_pretrained(tmp_path / "hybrid")
    tiny_tokenizer().save_pretrained(tmp_path / "hybrid")
    recipe = "defaults: [base, {model: smollm2_135m}, {data: demo_text}, {stage@stages.evaluate: evaluate}, _self_]\n"
    recipe += "stages: {evaluate: {inputs: {model: model, data: data.heldout}}}\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    words = [f"model.path={tmp_path / 'hybrid'}", f"paths.outputs={tmp_path / 'outputs'}"]
    found = make_plan(load_recipe("./mine.yaml", words, cwd=tmp_path))
    notes = [line for line in render(found).splitlines() if "cache:" in line]
    assert notes == [
        "  model: cache: 128 B a token and 5,120 B a sequence, states in fp32: 50.00% of plain attention's without the "
        "states (what papers print); with them 51.0% at 2k, 50.2% at 8k, 50.1% at 32k, 50.0% at 128k tokens"
    ]
    assert found["evaluate"].estimate.cache_state_bytes == 5120


def test_a_smaller_latent_beside_the_same_states_is_noted(tmp_path) -> None:
    made = plan(tmp_path, "scale=smoke")["assemble"].outputs["model"]
    wider = replace(made, architecture={**made.architecture, "kv_lora_rank": 2 * made.architecture["kv_lora_rank"]})
    given = Estimate(cache_bytes_per_token=64)
    assert len(with_states(given, {"model": made}, {"model": wider}).notes) == 1
    assert with_states(given, {"model": made}, {"model": made}).notes == ()


def test_models_without_states_are_planned_as_before(tmp_path) -> None:
    found = make_plan(load_recipe("x_ecomla", ["scale=smoke", f"paths.outputs={tmp_path}"]))
    for stage in found.stages:
        assert stage.estimate.cache_state_bytes is stage.estimate.cache_ratio_with_states is None
        assert not any(note.startswith("cache:") for note in stage.estimate.notes)
    assert "/seq" not in render(found)
