"""Every mistake of a user ends before anything runs: exit 2, one message, an empty working directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import artifact, posttrain

TYPOS = [
    "stages.distill.max_stesp=3",
    "stages.upcycle.kv_lora_rank=abc",
    "stages.evaluate.inputs.model=distil.model",
    "model=smolm2_135m",
]


def refused(*arguments: str, cwd: Path, code: int = 2) -> str:
    done = posttrain(*arguments, cwd=cwd, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stderr


def test_four_typos_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    message = refused("run", "x_ecomla", "scale=smoke", *TYPOS, cwd=tmp_path)
    for typed in TYPOS:
        assert typed in message
    for nearest in ("max_steps", "distill.model", "smollm2_135m"):
        assert nearest in message
    assert "4 problems" in message
    assert list(tmp_path.iterdir()) == []


def test_the_same_typos_in_a_yaml_have_file_and_line(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "recipes" / "x_ecomla.yaml").read_text()
    recipe = tmp_path / "mine.yaml"
    marker = "stages:\n"
    assert text.count(marker) == 1
    head, body = text.split(marker)
    body = body.replace("{model: distill.model", "{model: distil.model", 1)
    assert "distil.model" in body
    recipe.write_text(head + marker + body + "debris: 1\n")
    message = refused("plan", "./mine.yaml", "scale=smoke", cwd=tmp_path)
    lines = recipe.read_text().splitlines()
    for what in ("distil.model", "debris"):
        number = next(index for index, line in enumerate(lines, 1) if what in line)
        assert f"mine.yaml:{number}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "x_ecolma"], ["x_ecolma", "x_ecomla"]),
        (["run", "x_ecomla", "scale=smok"], ["smok", "smoke"]),
        (["run", "x_ecomla", "scale=smoke", "stage@stages.upcycle=mla_upcycel"], ["mla_upcycel", "mla_upcycle"]),
        (
            ["run", "x_ecomla", "scale=smoke", "stages.upcycle.inputs.model=distill.model"],
            ["cycle", "upcycle", "distill"],
        ),
        (["run", "x_ecomla", "scale=smoke", "~stages.upcycle.inputs.model"], ["model", "upcycle"]),
        (["run", "x_ecomla", "scale=smoke", "stages.distill.inputs.data=model"], ["dataset", "model"]),
        (["run", "x_ecomla", "scale=smoke", "~stages.distill"], ["distill"]),
        (
            ["run", "x_ecomla", "scale=smoke", "stages.upcycle.kv_ratio=null", "stages.upcycle.kv_lora_rank=4096"],
            ["4096"],
        ),
        (["run", "x_ecomla", "scale=smoke", "model.path=./absent"], ["absent"]),
        (["run", "x_ecomla", "scale=smoke", "data.path=./absent.jsonl"], ["absent.jsonl"]),
        (["run", "x_ecomla", "scale=smoke", "stages.x._target_=os.system"], ["_target_"]),
        (["run", "x_ecomla"], ["scale=demo", "--yes"]),
        (["status", "nothing"], ["nothing"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_refused_with_a_remedy(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    message = refused(*arguments, cwd=tmp_path)
    for word in words:
        assert word in message
    assert not (tmp_path / "outputs" / "store").exists()


@pytest.fixture(scope="module")
def model_folder(undisturbed: Path) -> Path:
    return artifact(undisturbed, "model") / "model"


def test_a_model_folder_without_config(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    assert "config.json" in refused("run", "x_ecomla", "scale=smoke", "model.path=./m", cwd=tmp_path)


def test_a_model_folder_with_truncated_weights(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    weights = next((tmp_path / "m").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused("run", "x_ecomla", "scale=smoke", "model.path=./m", cwd=tmp_path)
    assert weights.name in message


def test_an_unsupported_architecture_names_the_supported_ones(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    message = refused("run", "x_ecomla", "scale=smoke", "model.path=./m", cwd=tmp_path)
    assert "gpt2" in message and "llama" in message and "qwen2" in message


def test_a_teacher_with_another_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] = dict(
        zip(tokenizer["model"]["vocab"], reversed(range(len(tokenizer["model"]["vocab"]))), strict=True)
    )
    path.write_text(json.dumps(tokenizer))
    shutil.copytree(model_folder, tmp_path / "student")
    message = refused(
        "run", "x_ecomla", "scale=smoke", "model.path=./student", "+model@models.teacher=tiny",
        "models.teacher.path=./m", "stages.distill.inputs.teacher=models.teacher", cwd=tmp_path,
    )  # fmt: skip
    assert "tokenizer" in message


@pytest.mark.parametrize(("content", "word"), [("", "0"), ('{"text": "one line"}\n', "1")], ids=["empty", "one line"])
def test_data_too_small(content: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(content)
    done = posttrain("run", "x_ecomla", "scale=smoke", "data.path=./mine.jsonl", cwd=tmp_path, check=False)
    assert done.returncode in (1, 2)
    assert "mine.jsonl" in done.stderr and word in done.stderr and "Traceback" not in done.stderr


def test_a_manifest_edited_by_hand(undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(undisturbed, outputs, symlinks=True)
    path = artifact(outputs, "upcycle") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"]["result"]["edited"] = 1
    path.write_text(json.dumps(manifest))
    message = refused("run", "x_ecomla", "scale=smoke", cwd=tmp_path)
    assert "manifest.json" in message and "edited" in message
    verified = posttrain("verify", "all", cwd=tmp_path, check=False)
    assert verified.returncode == 1 and path.parent.name in verified.stdout and "SHA-256" in verified.stdout


def test_an_outputs_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("run", "x_ecomla", "scale=smoke", "paths.outputs=file/outputs", cwd=tmp_path)
    assert "file" in message and "paths.outputs" in message
