"""Compiled and recomputed layers: the same numbers, one graph a kind of layer, nothing left behind."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._dynamo.utils import counters
from training_world import make_mixed, make_model, make_trainer

from posttrain.training import speed
from posttrain.training.speed import attention_backends, causal_without_masks, decoder_layers, fast_layers

COMPILED = {"compiled": True, "backend": "aot_eager"}
IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def forward(model, ids=IDS):
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def loss_and_gradients(model):
    model.zero_grad()
    loss = forward(model).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def graphs():
    return counters["stats"]["unique_graphs"]


def assert_close(one, other):
    assert torch.allclose(one[0], other[0], rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("recomputed", "recomputed_mlps"), [(0, 4), (0, 2), (1, 3), (3, 3)])
def test_recomputed_mlps_give_the_same_numbers(compiled, recomputed, recomputed_mlps):
    model = make_mixed().train()
    before = loss_and_gradients(model)
    options = {**COMPILED, "compiled": compiled, "lean": compiled}
    with fast_layers(model, recomputed=recomputed, recomputed_mlps=recomputed_mlps, **options):
        assert sum("forward" in vars(layer.mlp) for layer in model.model.layers) == recomputed_mlps - recomputed
        assert_close(before, loss_and_gradients(model))
        assert not counters["graph_break"]
        if compiled:  # two kinds of mixer, each with and without
            assert graphs() <= 4
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)


def test_lean_layers_are_compiled_anew():
    model = make_model().train()
    for lean in (False, True, False):
        with fast_layers(model, lean=lean, **COMPILED):
            loss_and_gradients(model)
    assert graphs() == 2


def test_a_bf16_residual_stream(tmp_path):
    """Nearly the same first losses, and every layer's input is bf16."""
    histories, seen = [], set()
    for residual in ("float32", "bfloat16"):
        trainer = make_trainer(tmp_path / residual, precision="bf16", residual_dtype=residual)
        layer = decoder_layers(trainer.model)[-1]
        layer.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
        histories.append([row["loss"] for row in trainer.fit()])
    assert seen == {torch.float32, torch.bfloat16}
    assert histories[0] != histories[1] and histories[0] == pytest.approx(histories[1], rel=1e-2)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_all_layers_share_one_graph(recomputed, lean):
    model = make_model(num_hidden_layers=4).train()
    names = list(model.state_dict())
    before = loss_and_gradients(model)
    with fast_layers(model, recomputed=recomputed, lean=lean, **COMPILED):
        assert list(model.state_dict()) == names
        assert_close(before, loss_and_gradients(model))
        loss_and_gradients(model)
        assert graphs() == 1 and not counters["graph_break"]
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_recomputation_alone_changes_no_bit():
    model = make_model(num_hidden_layers=3).train()
    before = loss_and_gradients(model)
    with fast_layers(model, compiled=False, recomputed=2):
        after = loss_and_gradients(model)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(gradient, after[1][name]) for name, gradient in before[1].items())


def test_a_model_of_two_kinds_of_layer_has_two_graphs():
    model = make_mixed().train()
    before = loss_and_gradients(model)
    with fast_layers(model, recomputed=1, **COMPILED):
        assert_close(before, loss_and_gradients(model))
        assert graphs() == 2 and not counters["graph_break"]


def test_student_and_teacher_of_other_widths_side_by_side():
    student, teacher = make_model(num_hidden_layers=3).train(), make_model(hidden_size=48, num_hidden_layers=5).eval()
    teacher.requires_grad_(False)
    before = forward(teacher)
    with fast_layers(student, **COMPILED), fast_layers(teacher, **COMPILED):
        for _ in range(3):
            with torch.no_grad():
                assert torch.allclose(forward(teacher), before, atol=1e-5)
            loss_and_gradients(student)
        assert graphs() == 2


def test_frozen_ends_cost_one_graph_more():
    """With only mixers trained the first layer's input has no gradient, the others' have."""
    model = make_model(num_hidden_layers=4).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    before = loss_and_gradients(model)
    with fast_layers(model, **COMPILED):
        assert_close(before, loss_and_gradients(model))
        assert graphs() == 2


def test_many_kinds_of_layer_do_not_fall_back_to_eager():
    """torch gives up on a function after 8 variants and runs it uncompiled, in silence."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        for width in range(10):
            model = make_model(intermediate_size=64 + 8 * width, num_hidden_layers=1)
            stack.enter_context(fast_layers(model, **COMPILED))
            forward(model)
    assert graphs() == 10


def test_under_bf16_autocast_compiled_layers_stay_as_near_to_fp32():
    model = make_model(num_hidden_layers=2).train()
    exact = forward(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = (forward(model) - exact).abs().max()
        with fast_layers(model, **COMPILED):
            compiled = (forward(model) - exact).abs().max()
    assert 0 < compiled < 2 * plain


@pytest.mark.parametrize("make", [make_model, make_mixed])
def test_without_masks_rows_are_causal_and_nothing_asks_for_packed_documents(make, monkeypatch):
    from transformers import masking_utils

    model = make().eval()
    before = forward(model)
    asked = []
    original = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *a: asked.append(1) or original(*a))
    with causal_without_masks(model):
        assert torch.equal(forward(model), before)
        changed = torch.cat((IDS[:, :10], IDS[:, 10:] + 1), dim=1) % 300
        assert torch.equal(forward(model, changed)[:, :10], before[:, :10])
        assert not asked
    forward(model)
    assert asked and model.config._attn_implementation == "sdpa"
    assert "posttrain_causal" not in str(model.config.to_dict())


def test_a_model_with_eager_attention_keeps_its_mask():
    model = make_model(attn_implementation="eager").eval()
    before = forward(model)
    with causal_without_masks(model):
        assert torch.equal(forward(model), before)


def test_attention_kernels_of_a_gpu_are_not_asked_of_a_cpu():
    with attention_backends("cudnn", "cpu"):
        forward(make_model())
    assert set(speed.ATTENTION_ORDER) == {"cudnn", "flash", "efficient", "math"}
    with attention_backends("math", "cuda"):
        assert torch.backends.cuda.math_sdp_enabled() and not torch.backends.cuda.flash_sdp_enabled()


def test_a_failed_run_leaves_the_model_as_it_was():
    model = make_model()
    with pytest.raises(RuntimeError, match="stopped"):
        with fast_layers(model, compiled=False, recomputed=1), causal_without_masks(model):
            raise RuntimeError("stopped")
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))
    assert model.config._attn_implementation == "sdpa"


def test_compiled_training_learns_what_plain_training_learns(tmp_path, monkeypatch):
    """Through the trainer, with every step's backward pass, recomputation, a save and a resume."""
    original = fast_layers
    monkeypatch.setattr(speed, "fast_layers", lambda model, **how: original(model, **{**how, "backend": "aot_eager"}))
    plain = make_trainer(tmp_path / "plain").fit()
    trainer = make_trainer(tmp_path / "fast", compile="layers", activation_budget_gib=1e-4, save_every=3)
    assert trainer.compiles and trainer.activation_plan().recomputed > 0
    fast = trainer.fit()
    assert graphs() == 1
    resumed = make_trainer(tmp_path / "fast", compile="layers", activation_budget_gib=1e-4).fit()
    for one, other, again in zip(plain, fast, resumed, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert again == pytest.approx(other, rel=1e-6)


def test_auto_compiles_only_where_it_pays(tmp_path):
    trainer = make_trainer(tmp_path)
    assert not trainer.compiles and not trainer.config.compiles(on_gpu=True)
    long = trainer.config.model_copy(update={"max_steps": 50})
    assert long.compiles(on_gpu=True) and not long.compiles(on_gpu=False)
    assert not long.model_copy(update={"compile": "off"}).compiles(on_gpu=True)
