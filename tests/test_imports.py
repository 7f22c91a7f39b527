"""The one-way rule of the house, read from the source, and the promise that commands never import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "posttrain"
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "deepspeed", "wandb", "matplotlib"}

# A room may import the rooms named here, besides itself, `errors` and `paths`.
MAY_IMPORT = {
    "cli": {"pipeline", "launch", "config", "report", "models", "scaffold"},
    "scaffold": set(),
    "report": {"pipeline", "models"},
    "launch": {"pipeline", "config", "models"},
    "pipeline": {"config", "launch", "report"},
    "config": {"pipeline"},
    "methods": {"policy", "rewards", "training", "generation", "models", "data", "pipeline", "report"},
    "policy": {"rewards", "training", "generation", "models", "data", "pipeline"},
    "generation": {"models", "pipeline"},
    "training": {"models", "data", "pipeline"},
    "data": {"models", "rewards", "pipeline"},
    "rewards": {"pipeline"},
    "models": {"pipeline"},
}


def _imports(path: Path, *, top_level_only: bool) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
    return names


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room not in MAY_IMPORT:
        return
    for name in _imports(path, top_level_only=False):
        parts = name.split(".")
        if parts[0] == "posttrain" and len(parts) > 1 and parts[1] not in {room, "errors", "paths", "config"}:
            assert parts[1] in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {name}"


def test_a_method_does_not_import_another_method() -> None:
    for path in sorted((PACKAGE / "methods").rglob("*.py")):
        own = path.relative_to(PACKAGE / "methods").parts[0]
        for name in _imports(path, top_level_only=False):
            if name.startswith("posttrain.methods."):
                assert name.split(".")[2] == own, f"{path.relative_to(ROOT)} imports {name}"


def test_the_remote_code_folder_stands_alone() -> None:
    for path in sorted((PACKAGE / "models" / "upcycled").glob("*.py")):
        assert not any(name.split(".")[0] == "posttrain" for name in _imports(path, top_level_only=False)), path


def test_planning_modules_import_nothing_heavy_at_the_top() -> None:
    light = [*PACKAGE.glob("*.py")]
    for room in ("cli", "config", "pipeline", "launch", "report"):
        light += (PACKAGE / room).rglob("*.py")
    light += (PACKAGE / "methods").glob("*/config.py")
    light += (PACKAGE / "methods").glob("*/stage.py")
    light += [
        PACKAGE / "models" / name for name in ("architecture.py", "inspect.py", "stage.py", "config.py", "foreign.py")
    ]
    light += [PACKAGE / "training" / "config.py"]
    light += [PACKAGE / "data" / name for name in ("stage.py", "config.py", "foreign.py")]
    light += (PACKAGE / "rewards").glob("*.py")
    light += [PACKAGE / "generation" / name for name in ("__init__.py", "settings.py")]
    for path in light:
        heavy = HEAVY & {name.split(".")[0] for name in _imports(path, top_level_only=True)}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at module level"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["chat", "--help"],
        ["list"],
        ["show", "x_ecomla"],
        ["show", "distill"],
        ["plan", "x_ecomla", "--json"],
        ["submit", "x_ecomla", "scale=smoke", "--dry-run"],
        ["new", "stage", "own"],
        ["init"],
    ],
    ids=" ".join,
)
def test_a_command_never_imports_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from posttrain.cli.main import main\n"
        f"sys.argv = ['posttrain', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as error:\n    assert not error.code, error.code\n"
        "heavy = sorted({'torch', 'transformers', 'datasets', 'rich', 'matplotlib'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
