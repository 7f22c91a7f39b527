"""A captured micro-step trains as one that is not: same curve, same weights, for both kinds of mixer."""

from __future__ import annotations

import pytest
import torch
from training_world import make_mixed, make_model, make_trainer, requires_cuda

from posttrain.errors import StageError


def test_a_graph_is_refused_where_it_cannot_be(tmp_path):
    trainer = make_trainer(tmp_path, cuda_graph="on")
    with pytest.raises(StageError, match="it needs a GPU") as error:
        trainer.fit()
    assert "cuda_graph=auto" in str(error.value.problems[0].fix)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_auto_leaves_dropout_alone(tmp_path, dropout):
    trainer = make_trainer(tmp_path, make_model(attention_dropout=dropout))
    trainer.args.__dict__["_setup_devices"] = torch.device("cuda", 0)  # as on a GPU machine
    assert trainer.captures == (dropout == 0.0)


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("settings", [{}, {"compile": "layers"}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("make", [make_model, make_mixed])
def test_graphed_training_equals_eager_training(tmp_path, make, settings):
    outcomes = []
    for cuda_graph in ("on", "off"):
        torch.manual_seed(0)
        model = make().cuda()
        options = {"max_steps": 8, "weight_decay": 0.1, "cuda_graph": cuda_graph, "save_every": 3, **settings}
        trainer = make_trainer(tmp_path / cuda_graph, model, device="cuda", **options)
        outcomes.append((trainer.fit(), model))
    (graphed, one), (eager, other) = outcomes
    for row, expected in zip(graphed, eager, strict=True):
        assert row.keys() == expected.keys()
        assert all(abs(row[name] - expected[name]) <= 1e-4 * abs(expected[name]) for name in row)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), name


@pytest.mark.gpu
@requires_cuda
def test_a_batch_of_another_shape_runs_without_the_graph():
    from posttrain.training.graphed import GraphedMicroStep

    weight = torch.nn.Parameter(torch.randn(5, device="cuda"))
    unused = torch.nn.Parameter(torch.ones(2, device="cuda"))

    def compute(inputs):
        loss = (inputs["x"] @ weight).square().sum()
        return loss, {"twice": 2 * loss}

    step = GraphedMicroStep(compute, [weight, unused])
    for size in (4, 4, 4, 4, 7, 4):
        x = torch.randn(size, 5, device="cuda")
        weight.grad = None
        losses = []
        for _ in range(2):  # accumulates
            loss, parts = step({"x": x})
            losses += [loss, parts["twice"] / 2]
        expected = torch.autograd.grad(2 * compute({"x": x})[0], weight)[0]
        assert torch.allclose(weight.grad, expected, rtol=1e-4)
        assert all(torch.allclose(loss, compute({"x": x})[0].detach(), rtol=1e-4) for loss in losses)
    assert step.graph is not None and unused.grad is None
