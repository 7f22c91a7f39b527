"""The loss on a teacher's kept tokens against an independent fp64 reference."""

from __future__ import annotations

import pytest
import torch
from test_distillation_loss import B, T, V, _Fresh, _inputs, _Largest, _leaves, _reference

from posttrain.methods.distillation.loss import TopK, distillation_loss, top_k_loss
from posttrain.methods.distillation.topk import teacher_top_k


def kept(teacher_h, teacher_w, k, temperature=1.0, dtype=None, chunk=16):
    """What is kept of the teacher at every position, in the shape of the hidden states."""
    top = teacher_top_k(teacher_h.flatten(0, -2), teacher_w, k, temperature, chunk)
    top = TopK(*(tensor.unflatten(0, teacher_h.shape[:-1]) for tensor in top))
    return top if dtype is None else TopK(top.ids, top.logprobs.to(dtype))


def reference(student_h, student_w, teacher_h, teacher_w, k, temperature, mask, divisor):
    """fp64: both distributions written out, tokens outside the teacher's k likeliest summed to one symbol; autograd."""
    student_h, student_w = student_h.double().requires_grad_(), student_w.double().requires_grad_()
    p = (student_h @ student_w.T / temperature).exp()
    q = (teacher_h.double() @ teacher_w.double().T / temperature).exp()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    chosen = q.argsort(-1, descending=True)[..., :k]
    inside = torch.zeros_like(q).scatter(-1, chosen, 1.0)
    value = (inside * q * (q / p).log()).sum(-1)
    if k < q.shape[-1]:
        rest_p, rest_q = (((1 - inside) * x).sum(-1) for x in (p, q))
        value = value + rest_q * (rest_q / rest_p).log()
    loss = (value * mask).sum() / divisor
    return loss.detach(), *torch.autograd.grad(loss, (student_h, student_w))


@pytest.mark.parametrize("k", [1, 20, V - 1])
@pytest.mark.parametrize("chunk", [7, 4096])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["token_mean", "batch_sum"])
def test_value_and_gradients_equal_the_reference(reduction, temperature, chunk, k):
    tensors = _inputs(scale=1.0)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    divisor = mask.sum() if reduction == "token_mean" else B
    expected, grad_h, grad_w = reference(*tensors, k, temperature, mask, divisor)
    h, w = _leaves(*tensors[:2])
    top = kept(*tensors[2:], k, temperature)
    parts = top_k_loss(h, w, top, mask, reduction, temperature, chunk_tokens=chunk)
    (3.0 * parts.loss).backward()
    assert expected > 1e-3 and abs(parts.loss.item() / expected - 1) < 1e-5
    assert parts.kl_sum.item() == pytest.approx(expected.item() * int(divisor), rel=1e-5)
    assert (h.grad / 3 - grad_h).abs().max() <= 1e-5 * max(1, grad_h.abs().max())
    assert (w.grad / 3 - grad_w).abs().max() <= 1e-5 * max(1, grad_w.abs().max())
    assert grad_h.abs().max() > 1e-4 and (h.grad[~mask] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_it_is_the_full_forward_kl(temperature):
    tensors = _inputs()
    expected, grad_h, grad_w = _reference(*tensors, 1.0, temperature, B * T)
    h, w = _leaves(*tensors[:2])
    top = kept(*tensors[2:], V, temperature)
    assert (top.logprobs[..., -1] == -torch.inf).all()
    loss = top_k_loss(h, w, top, temperature=temperature, chunk_tokens=16).loss
    loss.backward()
    assert abs(loss.item() / expected - 1) < 1e-5
    assert (h.grad - grad_h).abs().max() <= 1e-5 and (w.grad - grad_w).abs().max() <= 1e-5


def test_more_tokens_never_lower_the_divergence_and_the_full_one_bounds_it():
    student_h, student_w, teacher_h, teacher_w = (tensor.double() for tensor in _inputs(scale=1.0))
    values = [
        top_k_loss(student_h, student_w, kept(teacher_h, teacher_w, k)).kl_sum.item() for k in (1, 3, 10, 100, 500, V)
    ]
    full = distillation_loss(student_h, student_w, teacher_h, teacher_w).kl_sum.item()
    assert all(low < high for low, high in zip(values, values[1:], strict=False))
    assert values[0] > 0 and values[-1] == pytest.approx(full, rel=1e-12)


def test_what_is_kept_equals_the_teachers_log_probabilities():
    _, _, teacher_h, teacher_w = _inputs(scale=1.0)
    q = (teacher_h.double() @ teacher_w.double().T / 1.7).softmax(-1)
    values, ids = q.sort(-1, descending=True)
    top = kept(teacher_h, teacher_w, 9, 1.7)
    assert top.ids.dtype == torch.int32 and top.logprobs.dtype == torch.float32
    assert torch.equal(top.ids.long(), ids[..., :9])
    assert (top.logprobs[..., :-1] - values[..., :9].log()).abs().max() < 1e-5
    assert (top.logprobs[..., -1] - values[..., 9:].sum(-1).log()).abs().max() < 1e-5


def test_gradients_by_finite_differences():
    generator = torch.Generator().manual_seed(5)
    h, w, th, tw = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 4), (11, 4), (5, 6), (11, 6))
    )
    options = {"labels": torch.tensor([3, -100, 0, 10, 7]), "ce_weight": 0.3, "temperature": 1.7, "chunk_tokens": 2}
    top = kept(th, tw, 4, 1.7)

    def check(h, w):
        return _Fresh.apply(h, w, lambda h, w: top_k_loss(h, w, top, **options).loss)

    assert torch.autograd.gradcheck(check, (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("k", [5, V])
def test_a_student_equal_to_the_teacher_has_nothing_to_learn(k):
    student_h, student_w, _, _ = _inputs(scale=2.0)
    h, w = _leaves(student_h, student_w)
    parts = top_k_loss(h, w, kept(student_h, student_w, k))
    parts.loss.backward()
    assert abs(parts.loss.item()) < 1e-6 and h.grad.abs().max() < 1e-6 and w.grad.abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_rounded_log_probabilities_still_are_a_distribution(dtype, apart):
    """Scaled to sum to 1, so that a divergence is never negative however they were rounded."""
    student_h, student_w, teacher_h, teacher_w = _inputs(scale=1.0)
    exact = top_k_loss(student_h, student_w, kept(teacher_h, teacher_w, 20)).kl_sum.item()
    rounded = top_k_loss(student_h, student_w, kept(teacher_h, teacher_w, 20, dtype=dtype)).kl_sum.item()
    assert rounded == pytest.approx(exact, rel=apart) and rounded != exact
    near = top_k_loss(teacher_h, teacher_w, kept(teacher_h, teacher_w, 20, dtype=dtype))
    assert 0 <= near.kl_sum.item() / near.tokens < apart**2


def test_a_sure_teacher_and_a_sure_student_stay_finite():
    """Rests that underflow: of the teacher (all mass kept), and of a student that is sure of another token."""
    student_h, student_w, teacher_h, teacher_w = _inputs(scale=20.0)
    for one, other in (((student_h, student_w), (teacher_h, teacher_w)), ((student_h, student_w),) * 2):
        for dtype in (torch.float32, torch.float16):
            h, w = _leaves(*one)
            loss = top_k_loss(h, w, kept(*other, 3, dtype=dtype)).loss
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(h.grad).all() and torch.isfinite(w.grad).all()


def test_cross_entropy_mix_equals_torch():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(4))
    labels[:, -1] = -100
    h, w = _leaves(student_h, student_w)
    top = kept(teacher_h, teacher_w, 30, 2.0)
    parts = top_k_loss(h, w, top, labels=labels, ce_weight=0.25, temperature=2.0, chunk_tokens=16)
    parts.loss.backward()
    h_, w_ = _leaves(student_h, student_w)
    ce = torch.nn.functional.cross_entropy((h_ @ w_.T).flatten(0, 1), labels.flatten(), ignore_index=-100)
    kl = top_k_loss(h_, w_, top, temperature=2.0).loss
    (0.75 * kl + 0.25 * ce).backward()
    assert parts.ce_sum.item() / parts.labelled == pytest.approx(ce.item(), rel=1e-6)
    assert parts.loss.item() == pytest.approx((0.75 * kl + 0.25 * ce).item(), rel=1e-6)
    assert torch.allclose(h.grad, h_.grad, atol=1e-6) and torch.allclose(w.grad, w_.grad, atol=1e-6)


def test_logits_of_all_tokens_never_exist():
    tokens, vocabulary, chunk = 512, 1000, 32
    generator = torch.Generator().manual_seed(0)
    h, w, th, tw = (
        torch.randn(*s, generator=generator) for s in ((tokens, 8), (vocabulary, 8), (tokens, 6), (vocabulary, 6))
    )
    h.requires_grad_()
    w.requires_grad_()
    with _Largest() as seen:
        top = teacher_top_k(th, tw, 10, 1.0, chunk)
        top_k_loss(h, w, top, labels=torch.arange(tokens), ce_weight=0.5, chunk_tokens=chunk).loss.backward()
    assert seen.numel == chunk * vocabulary


def test_bf16_autocast_and_frozen_heads():
    tensors = _inputs()
    expected, grad_h, _ = reference(*tensors, 20, 1.0, 1.0, B * T)
    (h,) = _leaves(tensors[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = top_k_loss(h, tensors[1], kept(*tensors[2:], 20)).loss
    loss.backward()
    assert abs(loss.item() / expected - 1) < 1e-5 and (h.grad - grad_h).abs().max() < 1e-6


def test_teachers_that_do_not_fit_are_refused():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    top = kept(teacher_h, teacher_w, 20)
    with pytest.raises(ValueError, match=r"must be \[110, k\]"):
        top_k_loss(student_h.flatten(0, 1)[:110], student_w, TopK(*(t.flatten(0, 1) for t in top)))
    with pytest.raises(ValueError, match="keeps 20 tokens, the student's head has 10"):
        top_k_loss(student_h, student_w[:10], top)
