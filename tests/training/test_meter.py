"""Numbers are read late and in order, nothing in a step waits for the device, and a NaN still stops a run in time."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from training_world import make_model, make_trainer, requires_cuda

from posttrain.errors import StageError
from posttrain.training import checkpoints
from posttrain.training.meter import Meter

WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


class Never:
    """An event that has not come to pass until somebody waits for it."""

    def __init__(self) -> None:
        self.waited = False

    def query(self) -> bool:
        return self.waited

    def synchronize(self) -> None:
        self.waited = True


@pytest.fixture
def slow(monkeypatch):
    """A CPU that behaves like a GPU whose results always come late."""
    original = Meter.push

    def push(self, *args):
        original(self, *args)
        self._pending[-1].arrived = Never()

    monkeypatch.setattr(Meter, "push", push)

    def defer(trainer, lag=2):
        trainer.meter = Meter(lag)
        return trainer

    return defer


def test_readings_come_in_order_and_no_later_than_the_lag(slow):
    meter = Meter(lag=2)
    seen = []
    for step in range(1, 6):
        meter.push(step, step / 10, {"loss": torch.tensor(float(step)), "lr": 0.5})
        seen.append([reading.step for reading in meter.pop()])
    assert seen == [[], [], [1], [2], [3]] and len(meter) == 2
    last = list(meter.pop(flush=True))
    assert [(r.step, r.epoch, r.values) for r in last] == [
        (4, 0.4, {"loss": 4.0, "lr": 0.5}),
        (5, 0.5, {"loss": 5.0, "lr": 0.5}),
    ]


def test_a_tensor_may_change_after_it_was_pushed_and_keeps_every_bit():
    meter = Meter(lag=3)
    value, exact = torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)
    meter.push(1, 0.0, {"loss": value, "kl": exact})
    expected = {"loss": value.item(), "kl": exact.item()}
    value.zero_()
    assert next(meter.pop(flush=True)).values == expected


def test_without_lag_every_step_is_read_at_once():
    meter = Meter()
    meter.push(1, 0.0, {"loss": torch.tensor(1.0)})
    assert [reading.values for reading in meter.pop()] == [{"loss": 1.0}]


def test_a_late_log_is_the_same_log(tmp_path, slow):
    """History, metrics, progress and what callbacks see, with a save and a stop's flush in between."""

    def run(name, lag):
        trainer = make_trainer(tmp_path / name, save_every=4)
        events, steps = [], []
        trainer.ctx.emit = lambda event, fields: events.append((event, fields.get("step", fields.get("done"))))
        original = trainer.log

        def log(logs, *args):
            steps.append((trainer.state.global_step, trainer.state.epoch))
            original(logs, *args)

        trainer.log = log
        history = (slow(trainer, lag) if lag else trainer).fit()
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row.pop("tokens_per_second")
        metrics = [step for event, step in events if event == "metrics"]
        saved = json.loads((tmp_path / name / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
        return history, rows, metrics, steps, [entry["step"] for entry in saved["log_history"]]

    now, late = run("now", 0), run("late", 3)
    assert now == late
    assert [row["step"] for row in now[0]] == now[2] == [1, 2, 3, 4, 5, 6] and now[4] == [1, 2, 3, 4]
    assert [step for step, _ in late[3]][:6] == [1, 2, 3, 4, 5, 6]


def test_no_step_waits_for_the_device(tmp_path, slow, monkeypatch):
    """On a CPU every way of turning a tensor into a Python value is watched; on a GPU see below."""
    trainer = slow(make_trainer(tmp_path, max_steps=5, precision="bf16"), lag=100)
    waits, inside = [], []

    def watch(name):
        original = getattr(torch.Tensor, name)

        def watched(self, *args, **kwargs):
            if inside:
                waits.append((trainer.state.global_step, name))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in WAITS:
        watch(name)
    original = trainer._maybe_log_save_evaluate

    def step_end(*args, **kwargs):
        if trainer.state.global_step >= trainer.state.max_steps:
            inside.clear()  # the last step gives out all numbers
        else:
            inside.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "_maybe_log_save_evaluate", step_end)
    assert len(trainer.fit()) == 5
    assert waits == []


def test_the_watch_above_sees_a_wait(tmp_path, slow, monkeypatch):
    """Guards it: the same trainer without lag reads every step."""
    trainer = make_trainer(tmp_path, max_steps=3)
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or original(self))
    trainer.fit()
    assert len(reads) >= 3


@pytest.mark.parametrize("lag", [0, 2, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_is_named_and_leaves_the_weights_alone(tmp_path, slow, lag, value):
    """However late the host learns of it: nothing after step 2 moved the weights, no checkpoint was made since."""
    make_trainer(tmp_path / "good", max_steps=6, save_every=2, lr_scheduler="constant").fit()
    expected = load_file(tmp_path / "good" / "checkpoints" / "checkpoint-2" / "model.safetensors")
    trainer = make_trainer(tmp_path / "bad", max_steps=6, save_every=2, lr_scheduler="constant")
    trainer = slow(trainer, lag) if lag else trainer
    trainer.spoil = (3, value)
    with pytest.raises(StageError, match=r"loss is (nan|inf) at step 3") as error:
        trainer.fit()
    assert "stages.rows.lr=" in str(error.value)
    newest = checkpoints.newest_complete(tmp_path / "bad" / "checkpoints")
    assert checkpoints.step_of(newest) == 2
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    rows = (tmp_path / "bad" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_a_bad_last_step_stops_too(tmp_path, slow):
    trainer = slow(make_trainer(tmp_path, max_steps=3), 100)
    trainer.spoil = (3, float("nan"))
    with pytest.raises(StageError, match="step 3"):
        trainer.fit()


def test_an_optimiser_that_cannot_skip_is_checked_before_its_step(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.args.optim = "adamw_torch"
    trainer.spoil = (2, float("nan"))
    with pytest.raises(StageError, match="step 2"):
        trainer.fit()
    assert trainer._skip is None and all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, requires_cuda])])
def test_fused_adamw_honours_found_inf(device):
    """The promise of torch that the trainer builds on: no moment, step count or weight moves where it is 1."""
    parameter = torch.nn.Parameter(torch.ones(5, device=device))
    optimiser = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    optimiser.found_inf = torch.zeros((), device=device)
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    before = {name: value.clone() for name, value in optimiser.state[parameter].items()}
    weights = parameter.detach().clone()
    assert (weights != 1).all()
    optimiser.found_inf.fill_(1.0)
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimiser.step()
    assert torch.equal(parameter, weights)
    assert all(torch.equal(value, before[name]) for name, value in optimiser.state[parameter].items())


@pytest.mark.gpu
@requires_cuda
def test_no_step_waits_for_the_gpu(tmp_path):
    """torch raises where a step would synchronise; reading an event that is two steps old is no such place."""
    from transformers import TrainerCallback

    class Forbid(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                torch.cuda.set_sync_debug_mode("default")

    trainer = make_trainer(tmp_path, make_model().cuda(), device="cuda", max_steps=10, precision="bf16")
    trainer.add_callback(Forbid())
    try:
        history = trainer.fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row["step"] for row in history] == list(range(1, 11))


@pytest.mark.gpu
@requires_cuda
@pytest.mark.parametrize("cuda_graph", ["on", "off"])
def test_a_bad_step_on_a_gpu(tmp_path, cuda_graph):
    settings = {"max_steps": 10, "save_every": 2, "cuda_graph": cuda_graph}
    trainer = make_trainer(tmp_path, make_model().cuda(), device="cuda", **settings)
    trainer.spoil = (5, float("nan"))
    with pytest.raises(StageError, match="step 5"):
        trainer.fit()
    assert checkpoints.step_of(checkpoints.newest_complete(tmp_path / "checkpoints")) == 4
    assert all(p.isfinite().all() for p in trainer.model.parameters())
