"""What has no exact stock export is refused by the plan and by the command, with the reason and a remedy."""

from __future__ import annotations

import pytest
from methods.export.export_world import LLAMA3, save

from posttrain.errors import RecipeError
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.program import main
from posttrain.methods.export.stage import Export
from posttrain.models.inspect import model_meta


@pytest.fixture
def architecture(tmp_path):
    return model_meta(save(tmp_path)).architecture


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"attention_bias": True}, {}, "no place for attention_bias"),
        ({"latent_bias": True, "mlp_bias": True}, {}, "no place for latent_bias, mlp_bias"),
        ({"qk_norm": True}, {}, "no QK-norm"),
        ({"mixers": ["latent_attention", "full_attention"]}, {}, "not every layer has latent attention"),
        ({"model_type": "llama"}, {}, "not every layer has latent attention"),
        ({"kv_lora_rank": [16, 32]}, {}, "differs from layer to layer"),
        ({"q_lora_rank": [16, None]}, {"pad_ranks": True}, "cannot be made uniform"),
        ({"kv_lora_rank": [16, 32], "qk_latent_layernorm": True}, {"pad_ranks": True}, "cannot be made uniform"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, {}, "no stock rotary"),
        ({"rope_parameters": LLAMA3}, {"loader": "vllm"}, "turn a deepseek_v3 of rope_type llama3 by their own YaRN"),
        ({"qk_latent_layernorm": True}, {}, "gives trained latent norms eps 1e-06"),
    ],
)
def test_the_plan_refuses_with_the_reason(architecture, changes, settings, said) -> None:
    from posttrain.pipeline.stage import ArtifactMeta

    meta = ArtifactMeta("model", {**architecture, **changes})
    with pytest.raises(RecipeError, match=said) as caught:
        Export().check(ExportConfig(to="deepseek_v3", **settings), {"model": meta})
    assert "native" in str(caught.value)
    Export().check(ExportConfig(to="deepseek_v3"), {"model": ArtifactMeta("model", architecture)})


@pytest.mark.parametrize(
    ("changes", "padded", "advice"),
    [({}, False, "pad_ranks=true"), ({"qk_latent_layernorm": True, "rms_norm_eps": 1e-6}, True, "uniform")],
)
def test_ranks_that_a_conversion_will_choose_are_refused_before_it_runs(architecture, changes, padded, advice) -> None:
    from posttrain.pipeline.stage import ArtifactMeta

    extra = {"open": ["kv_lora_rank"]}
    meta = ArtifactMeta("model", {**architecture, **changes}, extra=extra)
    with pytest.raises(RecipeError, match="every layer a kv_lora_rank of its own") as caught:
        Export().check(ExportConfig(to="deepseek_v3", pad_ranks=padded), {"model": meta})
    assert advice in str(caught.value)
    plain = ArtifactMeta("model", architecture, extra=extra)
    Export().check(ExportConfig(to="deepseek_v3", pad_ranks=True), {"model": plain})


def test_the_command_says_that_it_cannot_write(tmp_path, capsys) -> None:
    native = save(tmp_path)
    (tmp_path / "file").write_text("")
    assert main([str(native), str(tmp_path / "file" / "out"), "{}"]) == 2
    said = capsys.readouterr().err
    assert "cannot be written: Not a directory" in said and "--out DIR" in said


def test_the_command_names_a_weight_that_is_no_number(tmp_path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    native = save(tmp_path)
    state = load_file(native / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, native / "model.safetensors", metadata={"format": "pt"})
    assert main([str(native), str(tmp_path / "out"), "{}"]) == 1
    assert "tensor model.norm.weight of the model has NaN" in capsys.readouterr().err


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_certificate_names_no_server_that_the_plan_refuses(architecture, eps) -> None:
    from posttrain.methods.export.certificate import _servers

    for_vllm = _servers(ExportConfig(to="deepseek_v3", loader="vllm"), {**architecture, "rms_norm_eps": eps})
    assert for_vllm.startswith("vLLM and SGLang by their conventions")
    llama3 = {**architecture, "rms_norm_eps": eps, "rope_parameters": LLAMA3}
    said = _servers(ExportConfig(to="deepseek_v3"), llama3)
    assert said.startswith("transformers only") and "rope_type llama3 by their own YaRN" in said


def test_float16_is_refused_where_norms_are_linearised(architecture) -> None:
    from posttrain.pipeline.stage import ArtifactMeta

    half = {"model": ArtifactMeta("model", architecture, extra={"dtype": "float16"})}
    with pytest.raises(RecipeError, match="float16 weights cannot hold"):
        Export().check(ExportConfig(to="deepseek_v3"), half)
    Export().check(ExportConfig(to="deepseek_v3", dtype="bfloat16"), half)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"family": "qwen2"}, "no place for attention_bias"),
        ({"family": "llama", "settings": {"rotary_pairs": "fastest"}, "rope_parameters": LLAMA3}, "no stock rotary"),
    ],
)
def test_the_command_refuses_and_writes_nothing(tmp_path, capsys, fields, said) -> None:
    native = save(tmp_path, **fields)
    assert main([str(native), str(tmp_path / "out"), '{"to": "deepseek_v3"}']) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
