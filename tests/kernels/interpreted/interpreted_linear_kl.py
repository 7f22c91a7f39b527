"""The Triton row step of linear_kl on the CPU, in fp32, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import relative_error
from linear_kl_cases import expected, inputs, leaves, row_options
from posttrain_kernels.linear_kl import DIVERGENCES, linear_kl, op, scale, triton_rows

SMALL = {torch.float32: (2, 16, 4), torch.bfloat16: (2, 16, 4)}  # tiles of 32 entries


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, poison_empty):
    monkeypatch.setattr(triton_rows, "TILES", SMALL)


def _compare(tensors, tolerance=1e-5, floor=0.05, **options):
    chunk = options.pop("chunk_tokens", None)
    loss, values, ce, grad_h, grad_w = expected(tensors, **options)
    student_h, student_w, *teacher = leaves(tensors)
    result = linear_kl(student_h, student_w, *teacher, chunk_tokens=chunk, **options)
    result.loss.backward()
    assert (result.divergence - values).abs().max() < tolerance * max(1.0, float(values.abs().max()))
    assert abs(result.loss - loss) < tolerance * max(1.0, abs(loss))
    for grad, reference in ((student_h.grad, grad_h), (student_w.grad, grad_w)):
        assert (grad - reference).abs().max() < tolerance * max(floor, float(reference.abs().max()))
    if ce is not None:
        assert (result.cross_entropy - ce).abs().max() < 1e-5
    return result, student_h


@pytest.mark.parametrize("vocabulary", [7, 64, 101])  # below a tile, whole tiles, a ragged third one
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_odd_vocabularies(divergence, vocabulary):
    _compare(inputs(5, vocabulary, 6, 10), divergence=divergence, beta=0.3, chunk_tokens=2)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_mask_and_labels(divergence, temperature):
    options = row_options(7, 75, masked=True, labelled=True)
    result, student_h = _compare(
        inputs(7, 75, 6, 10, seed=1), divergence=divergence, temperature=temperature, chunk_tokens=3, **options
    )
    left_out = ~options["mask"]
    assert (student_h.grad[left_out] == 0).all() and (result.divergence[left_out] == 0).all()


@pytest.mark.parametrize("temperature", [0.01, 100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_ends_of_the_range_of_temperatures(divergence, temperature):
    """Values within 3e-3, and gradients within rounding, a few 1e-6 · D / T."""
    tensors = inputs(4, 101, 16, 24)
    loss, values, _, grad_h, _ = expected(tensors, divergence=divergence, temperature=temperature)
    student_h, student_w, *teacher = leaves(tensors)
    result = linear_kl(student_h, student_w, *teacher, divergence=divergence, temperature=temperature)
    result.loss.backward()
    assert relative_error(result.divergence, values) < 3e-3
    bound = 5e-5 * grad_h.abs().max() + 1e-5 * values.max() / temperature
    assert (student_h.grad - grad_h).abs().max() < bound and student_w.grad.isfinite().all()


def test_large_logits():
    student_h, student_w, teacher_h, teacher_w = inputs(3, 70, 6, 10)
    for divergence in DIVERGENCES:
        # fp32 spaces logits of 100 by 8e-6, and the head's gradient multiplies that by hidden states of 100.
        _compare(
            [student_h * 30, student_w, teacher_h * 30, teacher_w], tolerance=5e-4, floor=1.0, divergence=divergence
        )


def test_equal_models_give_exactly_zero():
    student_h, student_w, *_ = inputs(3, 70, 6, 6)
    h, w, *teacher = leaves([student_h, student_w, student_h, student_w])
    result = linear_kl(h, w, *teacher, temperature=0.7)
    result.loss.backward()
    assert result.loss == 0 and (h.grad == 0).all() and (w.grad == 0).all()


def test_rows_left_out_may_hold_nan():
    tensors = inputs(6, 75, 6, 10)
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    loss, _, _, grad_h, grad_w = expected(tensors, weights=weights)
    for hidden in (tensors[0], tensors[2]):
        hidden[weights == 0] = float("nan")
    student_h, student_w, *teacher = leaves(tensors)
    result = linear_kl(student_h, student_w, *teacher, weights=weights, chunk_tokens=4)
    result.loss.backward()
    assert abs(result.loss - loss) < 1e-5 * loss
    assert relative_error(student_h.grad, grad_h) < 1e-5 and relative_error(student_w.grad, grad_w) < 1e-5


def test_values_alone():
    tensors = inputs(5, 75, 6, 10)
    for divergence in DIVERGENCES:
        with torch.no_grad():
            result = linear_kl(*leaves(tensors), divergence=divergence, labels=torch.arange(5))
        _, values, ce, *_ = expected(tensors, divergence=divergence, labels=torch.arange(5))
        assert not result.loss.requires_grad
        assert relative_error(result.divergence, values) < 1e-5 and relative_error(result.cross_entropy, ce) < 1e-5


def test_a_label_that_is_no_token_is_loud():
    result = linear_kl(*leaves(inputs(3, 40, 6, 10)), labels=torch.tensor([0, 40, -100]))
    assert result.cross_entropy.isnan().tolist() == [False, True, False] and result.loss.isnan()


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_gradient_over_the_logits(logits_dtype):
    """As for bf16 operands on CUDA: the gradient goes over bf16 logits, or over fp32 ones of the teacher."""
    rows, vocabulary = 4, 139
    student, _, teacher, _ = inputs(rows, 8, vocabulary, vocabulary)
    options = {"divergence": "reverse_kl", "beta": 0.5, "temperature": 1.0, "want_grad": True}
    buffers = triton_rows.TritonRows(rows, vocabulary, logits_dtype, torch.bfloat16, torch.device("cpu"))
    buffers.student.copy_(student), buffers.teacher.copy_(teacher)
    logits = buffers.student.double().requires_grad_()
    log_s, log_t = logits.log_softmax(-1), buffers.teacher.double().log_softmax(-1)
    (log_s.exp() * (log_s - log_t)).sum().backward()
    values, _, grad = buffers.step(torch.ones(rows), None, None, None, **options)
    assert grad.dtype == torch.bfloat16 and values.isfinite().all()
    assert relative_error(grad, logits.grad) < 4e-3
    shared = {buffers.student.data_ptr(): "student", buffers.teacher.data_ptr(): "teacher"}.get(grad.data_ptr())
    assert shared == ("student" if logits_dtype == torch.bfloat16 else "teacher")


@pytest.mark.parametrize("factor", [1.0, -0.25])
@pytest.mark.parametrize("count", [1, 4096, 10_007])
def test_scaling_in_place(count, factor, monkeypatch):
    monkeypatch.setattr(scale, "PROGRAMS", 2)  # so that programs stride
    values = torch.randn(count)
    scaled = values.clone()
    before = scaled._version
    assert scale.scale_in_place(scaled, torch.tensor(factor)) is scaled
    assert torch.equal(scaled, values * factor) and scaled._version > before


def test_an_incoming_gradient_scales_and_a_second_backward_is_an_error():
    tensors = inputs(5, 75, 6, 10)
    *_, grad_h, grad_w = expected(tensors)
    student_h, student_w, *teacher = leaves(tensors)
    loss = linear_kl(student_h, student_w, *teacher).loss * 3.0
    loss.backward(retain_graph=True)
    assert relative_error(student_h.grad, 3 * grad_h) < 1e-5 and relative_error(student_w.grad, 3 * grad_w) < 1e-5
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_the_triton_step_is_what_runs(monkeypatch):
    monkeypatch.setattr(op, "TorchRows", None)
    _compare(inputs(3, 40, 6, 10))
