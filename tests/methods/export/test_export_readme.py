"""The README of an export is the card of the model that was exported, as far as its manifests tell."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from methods.export.export_world import save

from posttrain.config import registry
from posttrain.launch.execute import check_result
from posttrain.methods.export.config import ExportConfig
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.pipeline.store import publish, seal

KEY = "0123456789abcdef0123456789abcdef"
ARCHITECTURE = {"model_type": "upcycled"}


def artifact(tmp_path: Path) -> Path:
    """A converted model as an artifact of a store."""
    work = tmp_path / "store" / "mla_upcycle" / f".work-{KEY}"
    save(tmp_path)
    (work / "outputs").mkdir(parents=True)
    (tmp_path / "native").rename(work / "outputs" / "model")
    outputs = {"model": {"type": "model", "meta": ArtifactMeta("model", architecture=ARCHITECTURE).to_json()}}
    recipe = {"recipe": "mine", "run": "mine-1", "overrides": ["seed=3"], "scale": None, "deviations": []}
    body = {"format": 1, "key": KEY, "stage": "upcycle", "type": "mla_upcycle", "version": "3", "outputs": outputs}
    seal(work, {**body, "inputs": {}, "recipe": recipe, "seed": 3, "seconds": 2.0})
    return publish(work, work.parent / KEY).folder / "model"


def test_it_tells_the_models_lineage_and_what_exporting_did(tmp_path: Path) -> None:
    model = artifact(tmp_path)
    config = ExportConfig(to="deepseek_v3", dtype="bfloat16")
    given = {"model": InputArtifact(model, ArtifactMeta("model"), "upcycle.model")}
    context = StageContext("export", config, tmp_path / "work", given, 0, "cpu")
    folders = registry.stage("export").run(context)
    check_result("export", context.result)
    text = (folders["model"] / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers" and {"mine", "deepseek_v3", "mla_upcycle"} <= set(head["tags"])
    assert "license" not in head and "base_model" not in head
    manifest = json.loads((model.parent / "manifest.json").read_text())
    assert KEY in text and manifest["sha256"] in text and "posttrain run mine seed=3" in text
    certificate = json.loads((folders["certificate"] / "certificate.json").read_text())
    assert certificate["servers"].partition(":")[0] in text and "DeepseekV3ForCausalLM" in text
    assert certificate["digests"]["export"]["model.safetensors"] in text
    assert str(tmp_path) not in text
