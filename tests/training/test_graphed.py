"""A captured micro-step trains as one that is not: same curve, same weights, for both kinds of mixer."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from training_world import make_mixed, make_model, make_trainer, requires_cuda

from posttrain.errors import StageError
from posttrain.training import graphed
from posttrain.training.graphed import GraphedMicroStep


def test_a_graph_is_refused_where_it_cannot_be(tmp_path):
    trainer = make_trainer(tmp_path, cuda_graph="on")
    with pytest.raises(StageError, match="it needs a GPU") as error:
        trainer.fit()
    assert "cuda_graph=auto" in str(error.value.problems[0].fix)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "captures"),
    [
        ({}, True),
        ({"attention_dropout": 0.1}, False),
        ({"rope_parameters": DYNAMIC}, False),
        ({"attn_implementation": "eager"}, False),
    ],
    ids=str,
)
def test_auto_leaves_alone_what_cannot_be_captured(tmp_path, changes, captures):
    trainer = make_trainer(tmp_path, make_model(**changes))
    trainer.args.__dict__["_setup_devices"] = torch.device("cuda", 0)  # as on a GPU machine
    assert trainer.captures == captures


def test_ranks_that_hold_the_whole_model_capture_when_asked(tmp_path):
    """Gradients are added between the graphs; what is in shards is gathered within the step, by other ranks too."""
    for setting, captures in (("auto", False), ("on", True)):
        trainer = make_trainer(tmp_path / setting, cuda_graph=setting)
        trainer.args.__dict__["_setup_devices"] = torch.device("cuda", 0)
        trainer.ctx = replace(trainer.ctx, world_size=2, strategy="ddp")
        assert trainer.captures == captures
    trainer.sharding = object()
    with pytest.raises(StageError, match="the whole model on every rank"):
        assert trainer.captures


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch_size": 4}, {"micro_batch_size": 4, "compile": "layers"}, {"gradient_checkpointing": True}],
    ids=str,
)
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


class _Capture:
    """Stands for a CUDA graph on a CPU: capturing computes nothing, replaying computes into the same memory."""

    def __init__(self, step: GraphedMicroStep) -> None:
        self.step = step
        self.held: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> None:
        self.held = [(p, p.grad, p.grad.clone()) for p in self.step.parameters if p.grad is not None]

    def __exit__(self, *_: object) -> None:
        for _, memory, value in self.held:
            memory.copy_(value)
        before = {parameter for parameter, *_ in self.held}
        for parameter in self.step.parameters:
            if parameter.grad is not None and parameter not in before:
                parameter.grad.fill_(float("nan"))

    def replay(self) -> None:
        static = self.step._outputs
        if not self.step.accumulates:
            for parameter, _ in self.step._gradients:
                parameter.grad = None
        loss, parts = self.step._micro_step(self.step._inputs)
        static[0].copy_(loss)
        for name, value in parts.items():
            static[1][name].copy_(value)
        for parameter, memory in self.step._gradients:
            if parameter.grad is not memory:
                memory.copy_(parameter.grad)
                parameter.grad = memory


@pytest.fixture
def device(request, monkeypatch):
    """`cuda`, or a CPU that pretends, so that the bookkeeping is tested everywhere."""
    if request.param == "cuda":
        return "cuda"
    graphs = []

    class Stream:
        def wait_stream(self, _: object) -> None:
            pass

    def capture(step):
        graphs.append(_Capture(step))
        return graphs[-1]

    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "graph": lambda graph, **options: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphed, "_new_graph", capture)
    return "cpu"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])], indirect=True)
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_gradients_are_those_of_plain_backward(device, micro_batches):
    """Whatever the shapes in between, and with a parameter that takes no part."""
    weight = torch.nn.Parameter(torch.randn(5, device=device))
    unused = torch.nn.Parameter(torch.ones(2, device=device))

    def compute(inputs):
        loss = (inputs["x"] @ weight).square().sum()
        return loss, {"twice": 2 * loss}

    step = GraphedMicroStep(compute, [weight, unused], accumulates=micro_batches > 1)
    for size in (4, 4, 4, 4, 7, 4, 4):
        batches = [torch.randn(size, 5, device=device) for _ in range(micro_batches)]
        weight.grad = None
        for x in batches:
            loss, parts = step({"x": x})
            expected = compute({"x": x})[0].detach()
            assert torch.allclose(loss, expected, rtol=1e-4) and torch.allclose(parts["twice"], 2 * expected, rtol=1e-4)
        # The losses must not outlive this line: a graph of another stream that is alive while ours is captured ends it.
        (plain,) = torch.autograd.grad(sum(compute({"x": x})[0] for x in batches), weight)
        assert torch.allclose(weight.grad, plain, rtol=1e-4)
        with torch.no_grad():
            weight -= 0.01 * weight.grad
    assert step.graph is not None and unused.grad is None


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_gradients_are_not_lost_in_silence(device):
    weight = torch.nn.Parameter(torch.randn(5))
    step = GraphedMicroStep(lambda inputs: ((inputs["x"] @ weight).sum(), {}), [weight], accumulates=False)
    with pytest.raises(RuntimeError, match="would be lost"):
        for _ in range(4):
            step({"x": torch.randn(3, 5)})
