"""Layers are trained alone, one at a time, to the same result however the work is cut."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from layer_world import SMALL, STAGE, assert_same, context, converted, outcome, world  # noqa: F401
from source_models import make_source

from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.methods.layer_distillation import IldConfig
from posttrain.methods.layer_distillation.stage import layer_names, trained_parameters
from posttrain.methods.layer_distillation.trainer import LayerTrainer, layer_shares, select_by_layer
from posttrain.models.architecture import normalise
from posttrain.models.upcycling import convert_full_attention
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.training import checkpoints


def make_trainer(tmp_path, student=None, **changes) -> LayerTrainer:
    source = make_source("llama", seed=1, num_hidden_layers=3)
    config = IldConfig(**{**SMALL, "warmup_ratio": 0, **changes})
    blocks = torch.randint(0, 256, (8, config.sequence_length), generator=torch.Generator().manual_seed(0))
    student = converted(source, "state") if student is None else student
    return LayerTrainer(StageContext("ild", config, tmp_path, seed=3), config, student, source, blocks)


def one_step(trainer: LayerTrainer) -> list[dict[str, float]]:
    trainer.args.max_steps = 1
    return trainer.fit()


def test_layers_are_told_by_number_and_the_teachers_own_do_not_count(context, world) -> None:  # noqa: F811
    from posttrain.methods.hybrid_ssm import hybridize
    from posttrain.models.loading import load_model, save_model
    from posttrain.models.tiny import tiny_tokenizer

    row = {f"layer_{layer:02d}": 1.0 for layer in (100, 10, 99, 2)}
    assert layer_names({"loss": 1.0, **row}) == ["layer_02", "layer_10", "layer_99", "layer_100"]
    mixed = hybridize(load_model(world / "teacher"), ["full_attention", "mamba2", "mamba2"])
    save_model(mixed, tiny_tokenizer(), world / "mixed")
    _, _, result = outcome(context(student="mixed", max_steps=60))
    assert result["first_layer_losses"][0] == 0 and result["least_fall"] > 0.3


@pytest.mark.parametrize("kind", ["state", "latent"])
def test_every_layer_comes_nearer(context, kind: str) -> None:  # noqa: F811
    _, rows, result = outcome(context(student=kind, max_steps=60))
    assert len(rows) == 60 and rows[0].keys() >= {"loss", "lr", "grad_norm", "layer_00", "layer_02"}
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][f"layer_0{layer}"] for layer in range(3)))
    assert result["least_fall"] > 0.3


def test_layers_get_the_teachers_hidden_states_and_no_gradient_of_another(tmp_path) -> None:
    """A student whose first layer is far off: the others' losses and updates do not know of it."""
    source = make_source("llama", seed=1, num_hidden_layers=3)
    plain, spoilt = (convert_full_attention(source) for _ in range(2))
    with torch.no_grad():
        for student in (plain, spoilt):
            student.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
        spoilt.model.layers[0].mlp.up_proj.weight.mul_(3)
    rows = [one_step(make_trainer(tmp_path / name, model)) for name, model in (("a", plain), ("b", spoilt))]
    assert rows[0][0]["layer_00"] == 0 and rows[1][0]["layer_00"] > 1
    assert rows[0][0]["layer_01"] == rows[1][0]["layer_01"] > 0
    for name, parameter in plain.model.layers[1].named_parameters():
        assert torch.equal(parameter, spoilt.model.layers[1].get_parameter(name))


@pytest.mark.parametrize("kind", ["l2", "mse"])
def test_a_student_that_is_its_teacher_has_no_loss_and_stays(tmp_path, kind: str) -> None:
    source = make_source("llama", seed=1, num_hidden_layers=3)
    student = convert_full_attention(source)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    rows = make_trainer(tmp_path, student, loss=kind).fit()
    assert {row["loss"] for row in rows} == {0.0}
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_the_last_layer_is_compared_behind_the_final_norm(tmp_path) -> None:
    source = make_source("llama", seed=1, num_hidden_layers=3)
    student = convert_full_attention(source)
    with torch.no_grad():
        student.model.norm.weight.add_(0.5)
    (row,) = one_step(make_trainer(tmp_path, student))
    assert row["layer_00"] == row["layer_01"] == 0 < row["layer_02"]


def test_gradients_of_one_layer_exist_at_a_time(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    sizes, update = [], LayerTrainer._update

    def looking(self: LayerTrainer, layer: int, loss: torch.Tensor) -> torch.Tensor:
        held = {name for name, parameter in self.model.named_parameters() if parameter.grad is not None}
        assert held and all(name.startswith(f"model.layers.{layer}.") for name in held)
        sizes.append(sum(parameter.grad.nbytes for parameter in self.model.parameters() if parameter.grad is not None))
        return update(self, layer, loss)

    monkeypatch.setattr(LayerTrainer, "_update", looking)
    one_step(trainer)
    by_layer = trained_parameters(normalise(trainer.model.config.to_dict()), "block")
    assert sizes == [4 * count for count in by_layer] and trainer.gradient_bytes == max(sizes)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_teacher_runs_once_a_step(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    calls: Counter[int] = Counter()
    for index, layer in enumerate(trainer.teacher.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.update([index]))
    one_step(trainer)
    assert calls == {0: 2, 1: 2, 2: 2}  # two micro-batches


@pytest.mark.parametrize(
    ("trainable", "changed"),
    [
        ("mixer", {"self_attn"}),
        ("block", {"self_attn", "mlp", "norms"}),
        ("all", {"self_attn", "mlp", "norms", "norm"}),
    ],
)
def test_what_is_trained(tmp_path, trainable: str, changed: set[str]) -> None:
    trainer = make_trainer(tmp_path, trainable=trainable, lr=1e-1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    one_step(trainer)
    moved = set()
    for name, tensor in trainer.model.state_dict().items():
        if not torch.equal(tensor, before[name]):
            kinds = [kind for kind in ("self_attn", "mlp") if f".{kind}." in name]
            moved |= set(kinds) or {"norms" if "layernorm" in name else name.removeprefix("model.").partition(".")[0]}
    assert moved == changed
    count = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert count == sum(trained_parameters(normalise(trainer.model.config.to_dict()), trainable))


def test_micro_batches_do_not_change_the_step(context) -> None:  # noqa: F811
    one, other = (outcome(context(work=f"m{size}", micro_batch_size=size)) for size in (1, 4))
    for row, twin in zip(one[1], other[1], strict=True):
        assert row == pytest.approx(twin, rel=2e-4)
    for name in one[0]:
        torch.testing.assert_close(one[0][name], other[0][name], rtol=1e-3, atol=2e-4)


def test_interrupted_and_resumed_is_uninterrupted(context, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    whole = outcome(context(work="whole", save_every=2))
    ctx = context(work="cut", save_every=2)
    asked = iter([False, False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(StageContext, "should_stop", lambda self: next(asked))
        with pytest.raises(StopRequested):
            STAGE.run(ctx)
    assert checkpoints.step_of(checkpoints.newest_complete(ctx.checkpoint_dir)) == 3
    assert_same(whole, outcome(context(work="cut", save_every=2)))


def test_moments_are_freed_before_the_model_is_copied_to_be_written(context, monkeypatch) -> None:  # noqa: F811
    from posttrain.models import loading

    trainers, moments, fit, save = [], [], LayerTrainer.fit, loading.save_model

    def fit_and_tell(trainer: LayerTrainer) -> list[dict[str, float]]:
        history = fit(trainer)
        trainers.append(trainer)
        moments.append(len(trainer.optimizer.optimizer.state))
        return history

    def look_and_save(*arguments, **options):
        moments.append(len(trainers[0].optimizer.optimizer.state))
        return save(*arguments, **options)

    monkeypatch.setattr(LayerTrainer, "fit", fit_and_tell)
    monkeypatch.setattr(loading, "save_model", look_and_save)
    outcome(context(max_steps=2))
    assert moments[0] > 0 and moments[1:] == [0]


def test_layers_on_several_ranks_are_those_of_one() -> None:
    """Whatever the ranks, every layer has one owner, in order, and the most work is the least there can be."""
    for layers in (1, 3, 16, 30):
        for ranks in (1, 2, 3, 4, 8, 40):
            shares = layer_shares(layers, ranks)
            assert [layer for share in shares for layer in share] == list(range(layers))
            work = [share.stop + 3 * len(share) for share in shares if share]
            assert len(shares) == ranks and max(work) <= 4 * layers
    assert [len(share) for share in layer_shares(30, 2)] == [17, 13]


def test_a_loss_that_is_no_number_changes_nothing(tmp_path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    before = trainer.model.model.layers[1].self_attn.in_proj.weight.clone()
    with pytest.raises(StageError, match="the loss is nan at step 1"):
        trainer.fit()
    assert torch.equal(before, trainer.model.model.layers[1].self_attn.in_proj.weight)


def test_every_parameter_of_a_layer_is_its_own(tmp_path) -> None:
    student = converted(make_source("llama", num_hidden_layers=3), "state")
    found = select_by_layer(student, "all")
    assert len({id(parameter) for parameters in found for parameter in parameters}) == sum(map(len, found))
    assert not student.model.embed_tokens.weight.requires_grad


def metas(**changes) -> dict[str, ArtifactMeta]:
    source = make_source("llama", num_hidden_layers=3)
    models = {"student": converted(source, "state"), "teacher": source}
    shapes = {role: normalise(model.config.to_dict()) for role, model in models.items()}
    shapes["teacher"] = {**shapes["teacher"], **changes}
    found = {role: ArtifactMeta("model", shape, tokenizer="same") for role, shape in shapes.items()}
    return {**found, "data": ArtifactMeta("dataset", rows=3, tokens=1000)}


def test_a_student_that_is_its_own_teacher_is_refused() -> None:
    same = {"student": "state.model", "teacher": "state.model", "data": "data.train"}
    with pytest.raises(RecipeError, match="the teacher is the student itself"):
        STAGE.check(IldConfig(**SMALL, inputs=same), metas())
    STAGE.check(IldConfig(**SMALL, inputs={**same, "teacher": "model"}), metas())


def test_a_teacher_of_another_shape_is_refused() -> None:
    with pytest.raises(RecipeError, match="num_hidden_layers 3 and 4") as caught:
        STAGE.check(IldConfig(**SMALL), metas(num_hidden_layers=4))
    assert "converted from" in caught.value.problems[0].fix
    given = metas()
    given["teacher"] = ArtifactMeta("model", given["teacher"].architecture, tokenizer="other")
    with pytest.raises(RecipeError, match="different tokenizers"):
        STAGE.check(IldConfig(**SMALL), given)
    STAGE.check(IldConfig(**SMALL), metas())


def test_the_plan_counts_one_layers_gradients() -> None:
    given = metas()
    estimate = STAGE.estimate(IldConfig(**SMALL), given)
    layers = trained_parameters(given["student"].architecture, "block")
    assert estimate.memory["gradients"] == 4 * max(layers) and estimate.trainable == sum(layers)
    assert estimate.memory["optimizer"] == 8 * sum(layers)


@pytest.mark.parametrize(
    "setting", [{"cuda_graph": "on"}, {"gradient_checkpointing": True}, {"activation_budget_gib": 1}]
)
def test_settings_without_use_are_refused(setting) -> None:
    with pytest.raises(ValueError, match="has no use in ild"):
        IldConfig(**setting)
