"""Model cards of fabricated runs: what the manifests say, nothing else, and unknown where they say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fabricated_run import (
    CONVERTED,
    DATA_SHA256,
    DISTILLED,
    LABEL,
    SOURCE_PERPLEXITY,
    FabricatedRun,
    complete_run,
    dataset_outputs,
    evaluation_artifact,
    model_output,
    training_artifact,
)

from posttrain.errors import RecipeError
from posttrain.pipeline.store import manifest_digest
from posttrain.report import build, card_text, cards
from posttrain.report.card import card_of_unknown
from posttrain.report.read import read_run

PAPER = {"title": "A paper", "link": "https://example.org/1", "differs": ["It has another teacher."]}
DEVIATION = {"key": "stages.distill.lr", "recipe": 8e-5, "run": 1e-4, "because": "stages.distill.lr=1e-4"}
TOLD = {"scale": "demo", "paper": PAPER, "deviations": [DEVIATION]}
HOST = {"name": "secret-host", "cpus": 4, "cpu": "Test CPU", "gpu": "Test GPU"}
ENGINE = {"name": "gpu", "device": "cuda", "strategy": "single", "ranks": 1, "nodes": 1, "threads": 3}
DIRTY = {
    "commit": "c0ffee",
    "changed": True,
    "diff": {"sha256": "d1ff" * 16, "size": 2048, "kept": True},
    "untracked": [{"path": "posttrain/new.py", "sha256": "ee" * 32, "size": 3}],
}


def card_of(run_dir: Path, stage: str) -> dict[str, Any]:
    run = read_run(run_dir)
    found = run.stage(stage)
    assert found is not None
    return cards.card_of(run, found, "model")


def text_of(run_dir: Path, stage: str) -> str:
    return card_text.render(card_of(run_dir, stage))


def manifest_of(run_dir: Path, stage: str) -> dict[str, Any]:
    found = read_run(run_dir).stage(stage)
    assert found is not None and found.manifest is not None
    return found.manifest


def section(text: str, heading: str) -> str:
    assert f"\n## {heading}\n" in text, heading
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def change(run_dir: Path, stage: str, **fields: Any) -> None:
    """Other fields in the manifest of a finished stage, sealed again; None removes one."""
    found = read_run(run_dir).stage(stage)
    assert found is not None and found.folder is not None and found.manifest is not None
    manifest = {**found.manifest, **fields}
    manifest = {name: value for name, value in manifest.items() if value is not None and name != "sha256"}
    text = json.dumps({**manifest, "sha256": manifest_digest(manifest)})
    (found.folder / "manifest.json").write_text(text)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return complete_run(tmp_path / "outputs", **TOLD)


def test_the_chain_reaches_the_source_with_keys_and_digests(run_dir: Path) -> None:
    card, text = card_of(run_dir, "distill"), text_of(run_dir, "distill")
    assert card["title"] == f"{LABEL} → upcycle → distill" and text.startswith(f"# {card['title']}\n")
    assert [step["stage"] for step in card["lineage"]] == ["model", "upcycle", "data", "distill"]
    chain = section(text, "Where it comes from")
    for stage in ("model", "data", "upcycle", "distill"):
        manifest = manifest_of(run_dir, stage)
        assert manifest["key"] in chain and manifest["sha256"] in chain
    assert "upcycle.model as student, model.model as teacher, data.train as data" in chain
    assert "evaluate" not in chain, "what measures a model is not what it was made from"


def test_its_figures_are_those_of_the_stage_that_evaluates_it(run_dir: Path) -> None:
    for stage, evaluation, figures in (
        ("distill", "evaluate", DISTILLED),
        ("upcycle", "evaluate_converted", CONVERTED),
    ):
        (found,) = card_of(run_dir, stage)["evaluations"]
        assert found["stage"] == evaluation and found["baseline"] == LABEL
        assert found["model"]["perplexity"] == figures["perplexity"] and found["model"]["kl"] == figures["kl"]
        assert found["source"]["perplexity"] == SOURCE_PERPLEXITY
        assert found["conditions"]["data_sha256"] == DATA_SHA256
    shown = section(text_of(run_dir, "distill"), "Evaluation against the model it started from")
    assert "18.25 (16.00 to 20.50)" in shown and "14.50 (13.00 to 16.25)" in shown and DATA_SHA256 in shown
    assert "31.5" not in shown
    assert "77.9 %" in shown, "of the gap (31.5 - 14.5) 13.25 are closed"


def test_a_model_that_nobody_evaluated_says_so(run_dir: Path) -> None:
    assert card_of(run_dir, "model")["evaluations"] == []
    assert "None: no finished stage has evaluated this model." in text_of(run_dir, "model")


def test_data_with_rows_licence_and_users(tmp_path: Path) -> None:
    run = FabricatedRun(tmp_path / "outputs")
    run.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL)})
    extra = {"label": "Some text", "bytes": 4096, "sha256": "ab" * 32, "licence": "ODC-By 1.0"}
    meta = {"type": "dataset", "rows": 24, "tokens": 1024, "extra": extra}
    outputs = {name: (kind, meta, files) for name, (kind, _, files) in dataset_outputs().items()}
    config = {"hub": {"name": "owner/text", "revision": "f00d"}}
    document = {"config": {"source": "hub"}, "external": {"heldout_files": {"h.jsonl": "cd" * 32}}}
    artifact = {"outputs": outputs, "config": config, "manifest": {"key_document": document}}
    run.stage("data", "data_source", {}, artifact=artifact)
    inputs = {"student": "model.model", "teacher": "model.model", "data": "data.train"}
    run.stage("distill", "distill", inputs, artifact=training_artifact())
    folder = run.finish(**TOLD)
    shown = section(text_of(folder, "distill"), "Data")
    (row,) = [line for line in shown.splitlines() if line.startswith("| data.")]
    for value in (
        "Some text",
        "revision f00d",
        "| 24 |",
        "1,024",
        "4.00 KiB",
        "ODC-By 1.0",
        "ab" * 32,
        "distill (data)",
    ):
        assert value in row
    assert "cd" * 32 in shown
    assert yaml.safe_load(card_text.hub_head(card_of(folder, "distill")).split("---")[1])["datasets"] == ["owner/text"]


def test_what_was_typed_what_differs_and_why(run_dir: Path) -> None:
    text = text_of(run_dir, "distill")
    assert "posttrain run x_ecomla scale=demo stages.distill.lr=1e-4" in section(text, "How it was made")
    differs = section(text, "Where it differs from the paper")
    assert "A paper (https://example.org/1)" in differs and "- It has another teacher." in differs
    assert "| stages.distill.lr | 8e-05 | 0.0001 | stages.distill.lr=1e-4 |" in differs


def test_nothing_recorded_of_the_recipe_is_unknown_and_none_is_none(tmp_path: Path) -> None:
    old = complete_run(tmp_path / "old")
    text = text_of(old, "distill")
    assert "its paper is unknown" in text and "differs from the recipe at full scale is unknown" in text
    assert "Scale: unknown" in text
    plain = complete_run(tmp_path / "plain", scale=None, paper=None, deviations=[])
    text = text_of(plain, "distill")
    assert "names no paper" in text and "has the recipe's own settings" in text and "full scale is unknown" not in text
    assert "Scale: none, the recipe's full scale" in text


def test_settings_that_were_set_and_defaults_that_matter(run_dir: Path) -> None:
    document = {"config": {"max_steps": 40, "lr": 8e-5, "temperature": 1.0, "lora": None}, "seed": 7}
    config = {"type": "distill", "max_steps": 40, "lr": 1e-4, "temperature": 1.0, "lora": None, "save_every": 5}
    change(run_dir, "distill", config=config, key_document=document)
    step = card_of(run_dir, "distill")["lineage"][-1]
    assert step["set"] == {"max_steps": 40, "lr": 1e-4, "save_every": 5}
    assert step["defaults"] == {"temperature": 1.0} and step["seed"] == 7
    shown = section(text_of(run_dir, "distill"), "Settings")
    assert "distill (distill), seed 7:" in shown and "lr = 0.0001" in shown and "temperature = 1.0" in shown
    change(run_dir, "distill", key_document={"config": {}})
    assert card_of(run_dir, "distill")["lineage"][-1]["seed"] == "not used"


def test_code_hardware_and_time(run_dir: Path) -> None:
    change(run_dir, "distill", git=DIRTY, host=HOST, engine=ENGINE, attempts=3, seconds=3700.0, finished=0.0)
    change(run_dir, "upcycle", git={"commit": "abc", "changed": False}, finished=86400.0)
    change(run_dir, "data", git={"commit": None, "why": "not run from a git checkout", "version": "0.1", "sha256": "9"})
    text = text_of(run_dir, "distill")
    code = section(text, "Code and versions")
    assert "distill: commit c0ffee, changed: diff of 2.00 KiB, SHA-256 " + "d1ff" * 16 in code
    assert "posttrain/new.py (SHA-256 " + "ee" * 32 in code
    assert (
        "upcycle: commit abc, unchanged" in code and "model: commit feedbeef; whether it was changed is unknown" in code
    )
    assert "data: posttrain 0.1, not run from a git checkout; SHA-256 of its unknown source files 9" in code
    assert "uncommitted changes: distill." in text
    machines = section(text, "Hardware and time")
    assert "| distill | 1 h 01 min | 3 | gpu = Test GPU; cpu = Test CPU; cpus = 4 |" in machines
    assert "strategy = single; ranks = 1" in machines and "1970-01-02T00:00:00+00:00" in machines
    assert "secret-host" not in text and "secret-host" not in json.dumps(card_of(run_dir, "distill"))


def test_manifests_that_say_nothing_leave_everything_unknown(run_dir: Path) -> None:
    for stage in ("model", "data", "upcycle", "distill"):
        gone = dict.fromkeys(
            ("git", "host", "engine", "versions", "seconds", "attempts", "estimate", "config", "metrics")
        )
        change(run_dir, stage, **gone)
    card, text = card_of(run_dir, "distill"), text_of(run_dir, "distill")
    (source,) = card["sources"]
    assert source["licence"] is None and source["revision"] is None and source["parameters"] is None
    assert "Licence of the model it was made from: unknown" in text and "Parameters: unknown" in text
    assert "code unknown" in text and "versions: unknown" in text
    for row in section(text, "Hardware and time").splitlines()[3:]:
        assert not row or row.count("unknown") == 5, row
    head = yaml.safe_load(card_text.hub_head(card).split("---")[1])
    assert not {"base_model", "license", "datasets"} & set(head)
    assert "None" not in text.replace("None: no", ""), "a missing value must not be printed as Python has it"


def test_equal_manifests_give_equal_cards_and_no_path_of_the_machine(tmp_path: Path) -> None:
    config = {"path": "/home/somebody/private/my_model", "type": "model_source"}
    cards_ = []
    for name in ("one", "two"):
        outputs = tmp_path / name
        run = complete_run(outputs, **TOLD, source={"manifest": {"config": config}})
        cards_.append((card_of(run, "distill"), text_of(run, "distill")))
    assert cards_[0] == cards_[1]
    assert str(tmp_path) not in json.dumps(cards_[0]) and "/home/somebody" not in json.dumps(cards_[0])
    assert "path = my_model" in cards_[0][1]


@pytest.mark.parametrize(
    ("extra", "config", "result", "base", "licence", "said"),
    [
        (
            {"source": "hub", "licence": "llama3.2"},
            {"hub": "owner/m", "revision": "main"},
            {"revision": "f" * 40},
            "owner/m",
            {"license": "llama3.2"},
            f"Revision: {'f' * 40} (asked for: main)",
        ),
        (
            {"source": "package", "licence": "My own"},
            {"package": {"distribution": "wheel", "version": "1", "sha256": "ab" * 32}},
            {},
            None,
            {"license": "other", "license_name": "My own"},
            f"Python package wheel 1, a GGUF file of SHA-256 {'ab' * 32}",
        ),
        ({"source": "path"}, {"hub": "owner/ignored", "path": "./m"}, {}, None, {}, "a local folder"),
        ({"source": "hub"}, {"hub": "owner/m"}, {}, "owner/m", {}, "Revision: unknown"),
        ({}, {}, {}, None, {}, "From: unknown"),
    ],
    ids=["hub", "package", "path", "hub without facts", "nothing"],
)
def test_the_head_for_the_hub_has_what_is_known_of_the_source(
    tmp_path: Path, extra: dict, config: dict, result: dict, base: str | None, licence: dict, said: str
) -> None:
    model = {"outputs": model_output(LABEL, **extra), "config": config, "metrics": {"result": result}}
    run = complete_run(tmp_path / "outputs", source=model, **TOLD)
    head = yaml.safe_load(card_text.hub_head(card_of(run, "distill")).split("---")[1])
    assert head.get("base_model") == base
    assert {name: head[name] for name in ("license", "license_name") if name in head} == licence
    assert head["library_name"] == "transformers" and {"posttrain", "x_ecomla", "mla_upcycle"} <= set(head["tags"])
    assert said in section(text_of(run, "distill"), "Source models")


def test_random_weights_and_a_gate_that_kept_its_input_are_not_overlooked(tmp_path: Path) -> None:
    run = FabricatedRun(tmp_path / "outputs")
    run.stage("model", "model_source", {}, artifact={"outputs": model_output("tiny", source="random")})
    kept = {"result": {"kept": "input", "gate": {"reason": "pair_accuracy fell"}}}
    run.stage("prefer", "preference", {"model": "model.model"}, artifact={"outputs": model_output(), "metrics": kept})
    text = text_of(run.finish(), "prefer").partition("\n## ")[0]
    assert "tiny: random weights" in text and "prefer has passed on its input model, unchanged: pair" in text


@pytest.mark.parametrize(
    ("architecture", "words", "absent"),
    [
        (
            {"model_type": "upcycled"},
            ["posttrain.load", 'Tokenizer.from_pretrained("FOLDER", trust_remote_code=True)', "vLLM, SGLang, TGI"],
            ['("FOLDER")\ntokenizer', 'AutoTokenizer.from_pretrained("FOLDER")'],  # they ask whether to run its code
        ),
        ({"model_type": "llama"}, ["posttrain.load", "A plain llama"], ["trust_remote_code", "cannot load"]),
        (None, ["unknown: the manifest does not name its architecture"], ["posttrain.load", "cannot load"]),
    ],
    ids=["upcycled", "llama", "unknown"],
)
def test_who_can_load_it(tmp_path: Path, architecture: dict | None, words: list[str], absent: list[str]) -> None:
    run = FabricatedRun(tmp_path / "outputs")
    outputs = {"model": ("model", {"type": "model", "architecture": architecture, "extra": {}}, {"config.json": "{}"})}
    run.stage("model", "model_source", {}, artifact={"outputs": outputs})
    shown = section(text_of(run.finish(), "model"), "How to load it")
    assert all(word in shown for word in words) and not any(word in shown for word in absent)


def test_an_export_has_its_certificate_and_the_figures_of_what_it_was_made_of(tmp_path: Path) -> None:
    run = FabricatedRun(tmp_path / "outputs")
    run.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL)})
    run.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    run.stage("sft", "sft", {"model": "model.model", "data": "data.train"}, artifact=training_artifact())
    inputs = {"model": "sft.model", "baseline": "model.model", "data": "data.heldout"}
    run.stage("evaluate", "evaluate", inputs, artifact=evaluation_artifact(DISTILLED, "Yes."))
    certificate = {
        "to": "deepseek_v3",
        "loader": "vllm",
        "class": "DeepseekV3ForCausalLM",
        "servers": "vLLM by its conventions; transformers would be wrong",
        "caveats": {"a": "do not train it"},
        "steps": [{"name": "layout", "exact": True, "relative": 1.5e-7}],
    }
    outputs = {**model_output(), "certificate": ("certificate", {}, {"certificate.json": json.dumps(certificate)})}
    run.stage("export", "export", {"model": "sft.model"}, artifact={"outputs": outputs})
    text = text_of(run.finish(**TOLD), "export")
    shown = section(text, "How to load it")
    assert "transformers would be wrong" in shown and "do not train it" in shown and "```" not in shown
    assert "layout: relative logit error 1.5e-07, a condition" in section(text, "Export")
    figures = section(text, "Evaluation against the model it started from")
    assert "Of the model after sft" in figures and "18.25 (16.00 to 20.50)" in figures


def test_the_report_writes_a_card_for_every_model_and_no_other(run_dir: Path) -> None:
    folder = run_dir / "cards"
    folder.mkdir()
    (folder / "left_out.md").write_text("of a stage that is no longer there")
    page = build(run_dir)
    names = ["distill.json", "distill.md", "model.json", "model.md", "upcycle.json", "upcycle.md"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "distill.md").read_text() == text_of(run_dir, "distill")
    assert json.loads((folder / "distill.json").read_text()) == card_of(run_dir, "distill")
    report = (run_dir / "report.md").read_text()
    assert "cards/distill.md" in report and "It has another teacher." in report
    before = page.stat().st_mtime_ns
    build(run_dir)
    assert page.stat().st_mtime_ns == before
    (folder / "distill.json").unlink()
    build(run_dir)
    assert (folder / "distill.json").exists()


def test_other_deviations_make_another_report(tmp_path: Path) -> None:
    run_dir = complete_run(tmp_path / "outputs", **TOLD)
    build(run_dir)
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "deviations": []}))
    build(run_dir)
    assert "This run has the recipe's own settings." in (run_dir / "cards" / "distill.md").read_text()


def test_an_artifact_tells_its_lineage_without_its_run(run_dir: Path) -> None:
    recipe = {"recipe": "x_ecomla", "run": "first", "overrides": ["scale=demo"], "scale": "demo", "paper": PAPER}
    change(run_dir, "distill", recipe={**recipe, "description": "A test recipe.", "deviations": [DEVIATION]}, seed=7)
    found = read_run(run_dir).stage("distill")
    for path in (found.folder, found.folder / "model"):
        card = cards.card_of_artifact(path)
        inside = card_of(run_dir, "distill")
        same = ("title", "artifact", "lineage", "sources", "data", "evaluations")
        assert {name: card[name] for name in same} == {name: inside[name] for name in same}
        assert card["recipe"]["run"] == "first" and card["recipe"]["paper"] == PAPER and card["first_made"] is None
    assert inside["first_made"] == {"recipe": "x_ecomla", "run": "first", "scale": "demo", "overrides": ["scale=demo"]}
    assert "Run first had computed it" in text_of(run_dir, "distill")
    with pytest.raises(RecipeError, match="is no model"):
        cards.card_of_artifact(read_run(run_dir).stage("data").folder)
    with pytest.raises(RecipeError, match="is no artifact"):
        cards.card_of_artifact(run_dir)


def test_a_parent_that_is_gone_is_told_and_not_guessed(run_dir: Path) -> None:
    parent = read_run(run_dir).stage("upcycle")
    (parent.folder / "manifest.json").unlink()
    card = cards.card_of_artifact(read_run(run_dir).stage("distill").folder)
    steps = {step["stage"]: step for step in card["lineage"]}
    assert steps["upcycle"]["key"] == parent.key and not steps["upcycle"]["in_store"]
    assert steps["upcycle"]["type"] is None and steps["upcycle"]["manifest_sha256"] is None
    assert "upcycle is no longer in the store: what it was made of is unknown." in card_text.render(card)


def test_a_manifest_that_was_changed_makes_no_card(run_dir: Path) -> None:
    run = read_run(run_dir)
    changed = run.stage("upcycle").folder / "manifest.json"
    changed.write_text(changed.read_text().replace("0.167", "0.5"))
    with pytest.raises(RecipeError, match="SHA-256 does not match"):
        cards.card_of_artifact(run.stage("distill").folder)


def test_a_model_of_nobody_knows_where_is_called_that() -> None:
    text = card_text.render(card_of_unknown("my_model"))
    assert text.startswith("# my_model\n") and "where it comes from is unknown" in text
    assert "Licence of the model it was made from: unknown" in text
    assert "license: mit" in card_text.hub_head(card_of_unknown("my_model", "mit"))
