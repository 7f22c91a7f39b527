"""linear_kl on the CPU against its fp64 reference: values, gradients, masks, chunks, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import randn, relative_error
from linear_kl_cases import expected, inputs, leaves, row_options
from posttrain_kernels.linear_kl import DIVERGENCES, chunked, linear_kl, linear_kl_reference

N, V, D_S, D_T = 5, 37, 4, 6


class _Fresh(torch.autograd.Function):
    """The operator's gradient as gradcheck wants it: gradcheck calls backward often, the operator allows one call."""

    @staticmethod
    def forward(ctx, student_h, student_w, run):
        with torch.enable_grad():
            pair = [tensor.detach().requires_grad_() for tensor in (student_h, student_w)]
            loss = run(*pair)
        ctx.save_for_backward(*torch.autograd.grad(loss, pair))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return *(saved * grad for saved in ctx.saved_tensors), None


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence, temperature, labelled):
    student_h, student_w, *teacher = inputs(N, V, D_S, D_T, dtype=torch.float64)
    options = row_options(N, V, masked=True, labelled=labelled) | {"divergence": divergence, "beta": 0.3}

    def run(h, w):
        return linear_kl(h, w, *teacher, temperature=temperature, chunk_tokens=2, **options).loss

    def check(h, w):
        return _Fresh.apply(h, w, run)

    assert torch.autograd.gradcheck(check, (student_h.requires_grad_(), student_w.requires_grad_()))


def test_gradcheck_of_the_reference():
    student_h, student_w, *teacher = inputs(3, 11, D_S, D_T, dtype=torch.float64)
    options = row_options(3, 11, masked=True, labelled=True)
    for divergence in DIVERGENCES:

        def check(h, w, divergence=divergence):
            return linear_kl_reference(h, w, *teacher, divergence=divergence, beta=0.3, temperature=1.7, **options)[0]

        assert torch.autograd.gradcheck(check, (student_h.requires_grad_(), student_w.requires_grad_()))


def test_the_reference_by_definition():
    """Probabilities written out: the mixture weights the teacher by beta, and the limits of jsd are the two KLs."""
    p, q = torch.tensor([0.2, 0.8], dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64)
    eye, one = torch.eye(2, dtype=torch.float64), (p.log()[None], q.log()[None])

    def value(divergence, beta=0.5):
        return linear_kl_reference(one[0], eye, one[1], eye, divergence=divergence, beta=beta)[1].item()

    def kl(a, b):
        return (a * (a / b).log()).sum().item()

    mixture = 0.3 * q + 0.7 * p
    assert value("forward_kl") == pytest.approx(kl(q, p)) and value("reverse_kl") == pytest.approx(kl(p, q))
    assert value("jsd", 0.3) == pytest.approx(0.3 * kl(q, mixture) + 0.7 * kl(p, mixture))
    assert value("jsd", 1e-6) / 1e-6 == pytest.approx(kl(q, p), rel=1e-4)
    assert value("jsd", 1 - 1e-6) / 1e-6 == pytest.approx(kl(p, q), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_reference_in_fp64(divergence, masked, chunk, poison_empty):
    tensors = inputs(N, V, D_S, D_T, dtype=torch.float64)
    options = row_options(N, V, masked=masked, labelled=True) | {"divergence": divergence, "temperature": 0.7}
    options = {k: o.double() if k.endswith("weights") else o for k, o in options.items()}
    loss, values, ce, grad_h, grad_w = expected(tensors, **options)
    student_h, student_w, *teacher = leaves(tensors)
    result = linear_kl(student_h, student_w, *teacher, chunk_tokens=chunk, **options)
    (3 * result.loss).backward()
    assert abs(result.loss - loss) < 1e-10 and (result.divergence - values).abs().max() < 1e-10
    assert (result.cross_entropy - ce).abs().max() < 1e-10
    assert (student_h.grad / 3 - grad_h).abs().max() < 1e-10 and (student_w.grad / 3 - grad_w).abs().max() < 1e-10


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(dtype, divergence):
    """Sums and logits are fp32; gradients have their tensors' types."""
    tensors = inputs(9, 301, 16, 24, dtype=dtype)
    loss, values, _, grad_h, grad_w = expected(tensors, divergence=divergence)
    student_h, student_w, *teacher = leaves(tensors)
    result = linear_kl(student_h, student_w, *teacher, divergence=divergence)
    result.loss.backward()
    assert result.loss.dtype == result.divergence.dtype == torch.float32
    assert student_h.grad.dtype == student_w.grad.dtype == dtype
    assert abs(result.loss / loss - 1) < 1e-5 and relative_error(result.divergence, values) < 1e-5
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    assert relative_error(student_h.grad, grad_h) < tolerance and relative_error(student_w.grad, grad_w) < tolerance


def test_operands_are_bf16_only_where_the_triton_step_runs(monkeypatch):
    """Stand-ins for tensors on a GPU: without triton the torch step's fp32 gradients meet no bf16 head."""
    hidden = head = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    for triton, product in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(chunked, "use_triton", lambda *_, triton=triton: triton)
        assert chunked.product_dtype(hidden, head, torch.float32) == product
        assert chunked.logits_dtype(product, torch.float32, None) == product  # no logits_dtype: the operands' type
    assert chunked.logits_dtype(torch.bfloat16, torch.float32, torch.float32) == torch.float32


def test_one_head_for_both_models():
    student_h, student_w, _, _ = inputs(N, V, D_S, D_T)
    tensors = [student_h, student_w, randn(N, D_S, seed=9), student_w]
    *_, grad_h, grad_w = expected(tensors)
    head = student_w.clone().requires_grad_()
    hidden = student_h.clone().requires_grad_()
    linear_kl(hidden, head, tensors[2], head).loss.backward()
    assert relative_error(hidden.grad, grad_h) < 1e-5 and relative_error(head.grad, grad_w) < 1e-5


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_left_out_may_hold_nan(divergence, by_weight, poison_empty):
    tensors = inputs(N, V, D_S, D_T)
    options = row_options(N, V, masked=True, labelled=True)
    if by_weight:
        kept = options.pop("mask")
        for name in ("weights", "label_weights"):
            options[name] = options[name] * kept
    else:
        kept = options["mask"]
    loss, _, _, grad_h, grad_w = expected(tensors, divergence=divergence, **options)
    for hidden in (tensors[0], tensors[2]):
        hidden[~kept] = float("nan")
    student_h, student_w, *teacher = leaves(tensors)
    result = linear_kl(student_h, student_w, *teacher, divergence=divergence, chunk_tokens=2, **options)
    result.loss.backward()
    assert abs(result.loss - loss) < 1e-5 and (result.divergence[~kept] == 0).all()
    assert relative_error(student_h.grad, grad_h) < 1e-5 and relative_error(student_w.grad, grad_w) < 1e-5


def test_a_row_of_weight_zero_inside_the_mask_has_a_value():
    tensors = inputs(N, V, D_S, D_T)
    result = linear_kl(*tensors, weights=torch.zeros(N), mask=torch.ones(N))
    assert result.loss == 0 and (result.divergence > 0.1).all()
    assert (linear_kl(*tensors, weights=torch.zeros(N)).divergence == 0).all()


def test_only_the_gradients_that_are_needed():
    tensors = inputs(N, V, D_S, D_T)
    *_, grad_h, grad_w = expected(tensors)
    for needed, grad in ((0, grad_h), (1, grad_w)):
        given = [tensor.clone().requires_grad_(i == needed) for i, tensor in enumerate(tensors)]
        linear_kl(*given).loss.backward()
        assert relative_error(given[needed].grad, grad) < 1e-5 and given[1 - needed].grad is None
    assert not linear_kl(*tensors).loss.requires_grad
    with torch.no_grad():
        assert not linear_kl(*leaves(tensors)).loss.requires_grad


def test_no_tokens():
    _, student_w, _, teacher_w = inputs(N, V, D_S, D_T)
    head, hidden = student_w.requires_grad_(), torch.zeros(0, D_S, requires_grad=True)
    result = linear_kl(hidden, head, torch.zeros(0, D_T), teacher_w)
    result.loss.backward()
    assert result.loss == 0 and result.divergence.shape == (0,) and (head.grad == 0).all()


def test_backward_scales_in_place_and_once():
    student_h, student_w, *teacher = leaves(inputs(N, V, D_S, D_T))
    loss = linear_kl(student_h, student_w, *teacher).loss
    computed = [saved.data_ptr() for saved in loss.grad_fn.saved_tensors]
    loss.backward(retain_graph=True)
    assert [student_h.grad.data_ptr(), student_w.grad.data_ptr()] != [0, 0] and len(computed) == 2
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    loss = linear_kl(student_h, student_w, *teacher).loss
    computed = [saved.data_ptr() for saved in loss.grad_fn.saved_tensors]
    student_h.grad = student_w.grad = None
    loss.backward()
    # No copy of the head's gradient on the way to `.grad`.
    assert [student_h.grad.data_ptr(), student_w.grad.data_ptr()] == computed


def test_values_carry_no_gradient():
    result = linear_kl(*leaves(inputs(N, V, D_S, D_T)), labels=torch.arange(N))
    assert not result.divergence.requires_grad and not result.cross_entropy.requires_grad


def test_chunks_cover_the_rows_in_even_whole_units():
    for count in (0, 1, 127, 128, 1000, 8192):
        for most, unit in ((1, 1), (7, 7), (384, 128), (896, 128)):
            chunks = list(chunked.even_chunks(count, most, unit))
            assert [row for chunk in chunks for row in chunk] == list(range(count))
            assert all(0 < len(chunk) <= most for chunk in chunks)
            assert all(len(chunk) % unit == 0 for chunk in chunks[:-1])
    assert {len(chunk) for chunk in chunked.even_chunks(8192, 896, 128)} == {768, 896}


def test_default_chunks_keep_the_budget():
    for vocabulary in (1000, 49152, 128256):
        rows, unit = chunked.chunk_rows(vocabulary, torch.bfloat16, None)
        assert rows % unit == 0 and 0.6 * chunked.CHUNK_BYTES < 2 * rows * vocabulary * 2 <= chunked.CHUNK_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "forward_kl, reverse_kl, jsd"),
        ({"divergence": "jsd", "beta": 1.0}, "beta between 0 and 1"),
        ({"temperature": 0.0}, "temperature must be from 0.01 to 100, not 0.0"),
        ({"temperature": 1e-5}, "temperature"),
        ({"temperature": 1000.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"logits_dtype": torch.float16}, "logits_dtype"),
        ({"student_h": torch.zeros(1, N, D_S)}, r"\[N, D\]"),
        ({"teacher_h": torch.zeros(N + 1, D_T)}, "positions differ: 5 and 6"),
        ({"teacher_w": torch.zeros(V + 1, D_T)}, "vocabulary: 37 and 38"),
        ({"student_w": torch.zeros(V, D_S + 1)}, "student's hidden states have width 4, its head 5"),
        ({"weights": torch.ones(N + 1)}, r"weights must have shape \[5\]"),
        ({"mask": torch.ones(N, 1)}, r"mask must have shape \[5\]"),
        ({"labels": torch.ones(N - 1).long()}, r"labels must have shape \[5\]"),
        ({"label_weights": torch.ones(N)}, "label_weights need labels"),
    ],
)
def test_bad_input_is_refused(change, message):
    names = ("student_h", "student_w", "teacher_h", "teacher_w")
    arguments = dict(zip(names, inputs(N, V, D_S, D_T), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        linear_kl(**arguments)
