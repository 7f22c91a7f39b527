"""Whatever a process imports first, the import succeeds and the Auto classes know the upcycled decoder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("upcycled")
for auto in (AutoModel, AutoModelForCausalLM):
    found = auto._model_mapping[type(config)].__module__
    assert found == "posttrain.models.upcycled.modeling_upcycled", found
"""


@pytest.mark.parametrize(
    "first",
    [
        "posttrain.training.speed",
        "posttrain.models, posttrain.training.speed",
        "posttrain.models, transformers.modeling_layers",
        "posttrain.models, transformers.masking_utils",
        "posttrain.models, transformers.generation",
        "posttrain.models.upcycled.latent_upcycled",
        "posttrain.models.loading",
        "posttrain.methods.distillation.trainer",
    ],
)
def test_first_import_of_a_process(first: str) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", f"import {first}\nimport posttrain.models\n{KNOWN}"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
