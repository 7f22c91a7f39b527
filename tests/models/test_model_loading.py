"""Saving and loading: the same model comes back in another process, with this package and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_models import make_source
from transformers import AutoModelForCausalLM
from upcycled_models import make_latent, token_ids

import posttrain
from posttrain.errors import RecipeError, StageError
from posttrain.models.inspect import tensor_names, tokenizer_digest
from posttrain.models.loading import load_model, load_tokenizer, save_model
from posttrain.models.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SAVE_LOGITS = """
import torch
with torch.no_grad():
    torch.save([model(torch.load(ids, weights_only=True)).logits.float() for model in models], out)
"""


def _logits_in_a_new_process(code: str, tmp_path: Path, *, with_package: bool) -> list[torch.Tensor]:
    """What the `models` that `code` makes say to `token_ids()`; `folder` there is `tmp_path`."""
    torch.save(token_ids(), tmp_path / "ids.pt")
    head = f"folder, ids, out = {str(tmp_path)!r}, {str(tmp_path / 'ids.pt')!r}, {str(tmp_path / 'logits.pt')!r}\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT)] * with_package + _library_paths())
    done = subprocess.run(
        [sys.executable, "-c", head + code + SAVE_LOGITS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt", weights_only=True)


def _library_paths() -> list[str]:
    """What PYTHONPATH had besides this repository (the libraries may come from there)."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [path for path in given if path and not Path(path).resolve().is_relative_to(ROOT)]


def _logits(model: torch.nn.Module) -> torch.Tensor:
    model.set_attn_implementation("sdpa")  # what a loaded model has; the tiny sources are made with eager
    with torch.no_grad():
        return model(token_ids()).logits.float()


IMPORT_ORDERS = {
    "package first, and twice": "import importlib, posttrain.models\nimportlib.reload(posttrain.models)\n"
    "from transformers import AutoModelForCausalLM\nimportlib.reload(posttrain.models)\n",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport posttrain.models\n",
    "config table first": "from transformers import AutoConfig\nimport posttrain.models\n"
    "assert AutoConfig.from_pretrained(folder + '/m').mixers == ['full_attention', 'latent_attention']\n"
    "from transformers import AutoModelForCausalLM\n",
    "our modelling code first": "from posttrain.models.upcycled.modeling_upcycled import UpcycledConfig\n"
    "from transformers import AutoModelForCausalLM\n",
}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_auto_classes_know_the_model_in_any_import_order(order: str, tmp_path: Path) -> None:
    model = make_latent(mixers=["full_attention", "latent_attention"])
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "modeling_upcycled.py").unlink()  # this package's class, not the bundled code
    code = IMPORT_ORDERS[order] + (
        "from transformers import AutoConfig, AutoModel\n"
        "assert type(AutoConfig.from_pretrained(folder + '/m')).__module__.startswith('posttrain.')\n"
        "assert type(AutoModel.from_pretrained(folder + '/m')).__module__.startswith('posttrain.')\n"
        "models = [AutoModelForCausalLM.from_pretrained(folder + '/m')]\n"
        "assert type(models[0]).__module__ == 'posttrain.models.upcycled.modeling_upcycled'\n"
    )
    (logits,) = _logits_in_a_new_process(code, tmp_path, with_package=True)
    assert torch.equal(logits, _logits(model))


def test_remote_code_without_the_package(tmp_path: Path) -> None:
    models = [
        make_latent(**fields).to(dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for fields in (
            {},
            {"mixers": ["full_attention", "latent_attention"]},
            {"rope_frequency_indices": [7, 0, 3, 1], "q_lora_rank": 12, "qk_latent_layernorm": True},
            {"source": make_source(tie_word_embeddings=False), "kv_lora_rank": [8, 24]},
            {"source": make_source("qwen2"), "latent_bias": True},
        )
    ]
    for index, model in enumerate(models):
        save_model(model, tiny_tokenizer(), tmp_path / f"m{index}")
    code = (
        "import sys\n"
        "sys.modules['posttrain'] = None  # an import of the package fails, be it installed or not\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "def load(path):\n"
        "    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype='auto')\n"
        "AutoConfig.from_pretrained(folder + '/m0', trust_remote_code=True)\n"
        "AutoTokenizer.from_pretrained(folder + '/m0')\n"
        f"models = [load(f'{{folder}}/m{{index}}') for index in range({len(models)})]\n"
        "assert type(models[0]).__module__.startswith('transformers_modules.')\n"
        "models[0].save_pretrained(folder + '/again')\n"
        "models.append(load(folder + '/again'))\n"
    )
    logits = _logits_in_a_new_process(code, tmp_path, with_package=False)
    for model, theirs in zip([*models, models[0]], logits, strict=True):
        assert torch.equal(theirs, _logits(model))
    code_files = {file.name for file in (tmp_path / "m0").glob("*.py")}
    assert code_files <= {file.name for file in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("ranks", [24, [40, 6]], ids=["uniform", "by layer"])
def test_card_verification_10_plain_transformers_in_a_new_process(ranks: int | list[int], tmp_path: Path) -> None:
    models = [
        make_latent(family, kv_lora_rank=ranks).to(dtype)
        for family in ("llama", "qwen2", "qwen3")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for index, model in enumerate(models):
        save_model(model, tiny_tokenizer(), tmp_path / f"m{index}", max_shard_size="40KB")
        assert len(list((tmp_path / f"m{index}").glob("*.safetensors"))) > 1
    code = (
        "import sys\n"
        "sys.modules['posttrain'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "models = []\n"
        f"for index in range({len(models)}):\n"
        "    model, told = AutoModelForCausalLM.from_pretrained(\n"
        "        f'{folder}/m{index}', trust_remote_code=True, dtype='auto', output_loading_info=True\n"
        "    )\n"
        "    assert not any(told[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told\n"
        "    models.append(model)\n"
    )
    logits = _logits_in_a_new_process(code, tmp_path, with_package=False)
    for model, theirs in zip(models, logits, strict=True):
        assert torch.equal(theirs, _logits(model))


@pytest.mark.parametrize("ranks", [24, [40, 6]], ids=["uniform", "by layer"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_card_verification_10_a_merged_adapter_gives_equal_logits(family: str, ranks: int | list[int]) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_latent(family, kv_lora_rank=ranks)
    plain = _logits(model)
    targets = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    with torch.no_grad():
        attached = adapted(input_ids=token_ids()).logits
    assert (attached - plain).abs().max() > 1e-2, "the adapter does nothing"
    merged = adapted.merge_and_unload()
    assert torch.allclose(_logits(merged), attached, atol=1e-4)
    with torch.no_grad():  # merged projections are absorbed again
        past = merged(token_ids()[:, :-1], use_cache=True).past_key_values
        step = merged(token_ids()[:, -1:], past_key_values=past).logits[:, 0]
    assert torch.allclose(step, attached[:, -1], atol=1e-4)


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_round_trip_through_a_folder(dtype: torch.dtype | None, shard: str, tmp_path: Path) -> None:
    model = make_latent(mixers=["full_attention", "latent_attention"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tiny_tokenizer(), tmp_path / "m", dtype=dtype, max_shard_size=shard)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard == "40KB")
    again = load_model(tmp_path / "m", dtype="auto")
    assert again.dtype == (dtype or torch.float32)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(again.dtype)[6:]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, before[name].to(again.dtype)), name
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before), "saving changed the model"
    assert model.dtype == torch.float32
    assert not again.training
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "scratch files stay behind"
    assert load_tokenizer(tmp_path / "m")("ab").input_ids == [97, 98]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in tensor_names(tmp_path / "m"), "tied weights are written twice"


def test_a_tokenizer_that_its_class_would_change_is_copied(tmp_path: Path) -> None:
    save_model(make_source("qwen2"), tiny_tokenizer(), tmp_path / "a")
    tokenizer = load_tokenizer(tmp_path / "a")
    save_model(make_source("qwen2"), tokenizer, tmp_path / "b", tokenizer_from=tmp_path / "a")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "b").eos_token == tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "c")
    assert tokenizer_digest(tmp_path / "c") != tokenizer_digest(tmp_path / "a"), "the copy would not be needed"


def test_saving_over_an_older_model_leaves_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    save_model(make_source(seed=1), tiny_tokenizer(), tmp_path / "m", max_shard_size="40KB")
    save_model(make_source(seed=2), tiny_tokenizer(), tmp_path / "m")
    assert [file.name for file in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert torch.equal(_logits(load_model(tmp_path / "m")), _logits(make_source(seed=2)))


def test_a_save_that_the_disk_corrupts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, save = make_source(), type(make_source()).save_pretrained

    def corrupt(self, folder, **kwargs) -> None:
        save(self, folder, **kwargs)
        tensors = load_file(Path(folder) / "model.safetensors")
        tensors["model.norm.weight"][3] = -0.0 if tensors["model.norm.weight"][3] == 0 else 2.0
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})

    save_model(model, None, tmp_path / "m")
    monkeypatch.setattr(type(model), "save_pretrained", corrupt)
    with pytest.raises(StageError, match="model.norm.weight was not written as it is in memory"):
        save_model(model, None, tmp_path / "m")
    assert torch.equal(_logits(load_model(tmp_path / "m")), _logits(model)), "the former save must survive"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sources_load_as_themselves(family: str, tmp_path: Path) -> None:
    source = make_source(family)
    save_model(source, tiny_tokenizer(), tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(source)
    assert torch.equal(_logits(again), _logits(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing keys: model.norm.weight"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "unexpected keys: other"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), "mismatched keys: .*model.norm.weight"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_weights_that_are_not_those_of_the_architecture(change, message: str, tmp_path: Path) -> None:
    save_model(make_latent(), None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageError, match=message):
        load_model(tmp_path)


def test_old_rotary_buffers_are_not_minded(tmp_path: Path) -> None:
    source = make_source()
    save_model(source, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(_logits(load_model(tmp_path)), _logits(source))


def test_a_truncated_folder_is_refused_before_loading(tmp_path: Path) -> None:
    save_model(make_source(), None, tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(RecipeError, match="truncated"):
        load_model(tmp_path)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    save_model(make_source(), None, tmp_path)
    with pytest.raises(StageError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_load_from_the_top_of_the_package(tmp_path: Path) -> None:
    model = make_latent()
    save_model(model, tiny_tokenizer(), tmp_path, dtype=torch.bfloat16)
    again, tokenizer = posttrain.load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert tokenizer.eos_token_id == 257
    with pytest.raises(AttributeError, match="lod"):
        posttrain.lod  # noqa: B018


def test_a_saved_model_names_its_code(tmp_path: Path) -> None:
    save_model(make_latent(), None, tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_upcycled.UpcycledConfig",
        "AutoModelForCausalLM": "modeling_upcycled.UpcycledForCausalLM",
    }
    written = {file.name for file in tmp_path.glob("*.py")}
    assert written == {
        file.name for file in (ROOT / "posttrain" / "models" / "upcycled").glob("*.py") if file.name != "__init__.py"
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.auto_map == auto_map
