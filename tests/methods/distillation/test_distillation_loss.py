"""The chunked distillation loss against an independent fp64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.methods.distillation import distillation_loss, kl_from_hidden

B, T, D_S, D_T, V = 3, 37, 24, 40, 1000


def _inputs(seed=0, dtype=torch.float32, scale=0.5):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return draw(B, T, D_S), draw(V, D_S), draw(B, T, D_T), draw(V, D_T)


def _reference(student_h, student_w, teacher_h, teacher_w, mask, temperature, divisor):
    """fp64 KL from probabilities written out, no log-softmax, and its autograd gradients."""
    student_h, student_w = student_h.double().requires_grad_(), student_w.double().requires_grad_()
    s = (student_h @ student_w.T / temperature).exp()
    t = (teacher_h.double() @ teacher_w.double().T / temperature).exp()
    p, q = s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True)
    loss = ((q * (q / p).log()).sum(-1) * mask).sum() / divisor
    return loss.detach(), *torch.autograd.grad(loss, (student_h, student_w))


def _leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["token_mean", "batch_sum"])
def test_card_verification_12_chunks_equal_the_naive_loss(reduction, temperature, chunk):
    """On 1000 tokens of vocabulary: the value, and gradients to hidden states and head within 1e-5 of fp64's."""
    student_h, student_w, teacher_h, teacher_w = _inputs()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    divisor = mask.sum() if reduction == "token_mean" else B
    expected, grad_h, grad_w = _reference(student_h, student_w, teacher_h, teacher_w, mask, temperature, divisor)
    h, w = _leaves(student_h, student_w)
    loss = kl_from_hidden(h, w, teacher_h, teacher_w, mask, reduction, temperature, chunk_tokens=chunk)
    (3.0 * loss).backward()
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert expected > 0.1
    assert abs(loss.item() / expected - 1) < 1e-5
    assert (h.grad / 3 - grad_h).abs().max() <= 1e-5 * max(1, grad_h.abs().max())
    assert (w.grad / 3 - grad_w).abs().max() <= 1e-5 * max(1, grad_w.abs().max())
    assert grad_h.abs().max() > 1e-4 and (h.grad[~mask] == 0).all()
    naive_h, naive_w = _leaves(student_h, student_w)
    naive = _naive(naive_h, naive_w, teacher_h, teacher_w, mask, temperature) / divisor
    naive.backward()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    assert (h.grad / 3 - naive_h.grad).abs().max() <= 1e-5 and (w.grad / 3 - naive_w.grad).abs().max() <= 1e-5


def _naive(student_h, student_w, teacher_h, teacher_w, mask, temperature):
    """What one would write: all logits of both models, torch's own divergence."""
    log_s = (student_h @ student_w.T / temperature).log_softmax(-1)
    log_t = (teacher_h @ teacher_w.T / temperature).log_softmax(-1)
    return torch.nn.functional.kl_div(log_s[mask], log_t[mask], reduction="sum", log_target=True)


class _Fresh(torch.autograd.Function):
    """The loss's gradient as gradcheck wants it: gradcheck calls backward often, the loss allows one call."""

    @staticmethod
    def forward(ctx, h, w, loss):
        with torch.enable_grad():
            pair = [tensor.detach().requires_grad_() for tensor in (h, w)]
            value = loss(*pair)
        ctx.save_for_backward(*torch.autograd.grad(value, pair))
        return value.detach()

    @staticmethod
    def backward(ctx, grad):
        return *(saved * grad for saved in ctx.saved_tensors), None


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients_by_finite_differences(divergence):
    generator = torch.Generator().manual_seed(5)
    h, w, th, tw = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 4), (11, 4), (5, 6), (11, 6))
    )
    labels = torch.tensor([3, -100, 0, 10, 7])

    options = {"ce_weight": 0.3, "temperature": 1.7, "chunk_tokens": 2, "divergence": divergence, "beta": 0.3}

    def loss(h, w):
        return distillation_loss(h, w, th, tw, labels=labels, **options).loss

    def check(h, w):
        return _Fresh.apply(h, w, loss)

    assert torch.autograd.gradcheck(check, (h.requires_grad_(), w.requires_grad_()))


def test_a_second_backward_is_an_error():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    h, w = _leaves(student_h, student_w)
    loss = kl_from_hidden(h, w, teacher_h, teacher_w)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_directions_of_the_divergences():
    """The student that puts no mass where the teacher has half of its own: only forward KL is large."""
    head = torch.eye(2)
    even, sure = torch.zeros(1, 1, 2), torch.tensor([[[20.0, 0.0]]])
    assert kl_from_hidden(sure, head, even, head, divergence="forward_kl").item() > 9
    assert kl_from_hidden(sure, head, even, head, divergence="reverse_kl").item() == pytest.approx(0.6931, abs=1e-3)
    # m = (3/4, 1/4): 1/2 KL((1/2, 1/2) || m) + 1/2 KL((1, 0) || m)
    assert kl_from_hidden(sure, head, even, head, divergence="jsd").item() == pytest.approx(0.2158, abs=1e-3)
    with pytest.raises(ValueError, match="forward_kl"):
        kl_from_hidden(sure, head, even, head, divergence="kl")


def test_pure_cross_entropy_still_reports_the_divergence():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    labels = torch.full((B, T), -100)
    labels[:, 0] = 3
    kl = distillation_loss(student_h, student_w, teacher_h, teacher_w).kl_sum
    parts = distillation_loss(student_h, student_w, teacher_h, teacher_w, labels=labels, ce_weight=1.0)
    assert parts.kl_sum.item() == pytest.approx(kl.item(), rel=1e-6)
    assert parts.loss.item() == pytest.approx(parts.ce_sum.item() / B, rel=1e-6)


def test_flat_and_batched_input_are_the_same():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    batched = kl_from_hidden(student_h, student_w, teacher_h, teacher_w)
    flat = kl_from_hidden(student_h.flatten(0, 1), student_w, teacher_h.flatten(0, 1), teacher_w)
    assert torch.equal(batched, flat)
    summed = kl_from_hidden(student_h, student_w, teacher_h, teacher_w, None, "batch_sum")
    assert torch.allclose(summed, batched * T)


def test_card_verification_12_zero_when_the_student_is_the_teacher():
    student_h, student_w, _, _ = _inputs(scale=2.0)
    for temperature in (1.0, 0.7):
        h, w = _leaves(student_h, student_w)
        loss = kl_from_hidden(h, w, student_h, student_w, None, "batch_sum", temperature, chunk_tokens=10)
        loss.backward()
        assert loss.item() == 0.0
        assert (h.grad == 0).all() and (w.grad == 0).all()


def test_direction_is_teacher_to_student():
    """A student that puts no mass where the teacher has half of its own pays for it; the reverse does not."""
    head = torch.eye(2)
    even, sure = torch.zeros(1, 1, 2), torch.tensor([[[20.0, 0.0]]])
    assert kl_from_hidden(sure, head, even, head).item() > 9
    assert kl_from_hidden(even, head, sure, head).item() == pytest.approx(0.6931, abs=1e-3)


def test_no_temperature_squared():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    hot = kl_from_hidden(student_h, student_w, teacher_h, teacher_w, None, "token_mean", 3.0)
    scaled = kl_from_hidden(student_h / 3, student_w, teacher_h / 3, teacher_w)
    assert torch.allclose(hot, scaled, rtol=1e-5)


def test_extreme_logits_stay_finite():
    student_h, student_w, teacher_h, teacher_w = _inputs(scale=20.0)
    h, w = _leaves(student_h, student_w)
    loss = kl_from_hidden(h, w, teacher_h, teacher_w)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(h.grad).all() and torch.isfinite(w.grad).all()


@pytest.mark.parametrize("reduction", ["token_mean", "batch_sum"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_micro_batches_add_up(reduction, ce_weight):
    student_h, student_w, teacher_h, teacher_w = _inputs()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) > 0.5
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3)).masked_fill(~mask, -100)
    totals = {"tokens": int(mask.sum()), "label_tokens": int(mask.sum()), "sequences": B}

    def run(rows):
        h, w = _leaves(student_h[rows], student_w)
        loss = distillation_loss(
            h, w, teacher_h[rows], teacher_w, mask[rows], reduction, labels=labels[rows], ce_weight=ce_weight, **totals
        ).loss
        loss.backward()
        return loss.item(), w.grad

    whole, grad = run(slice(None))
    parts = [run(slice(i, i + 1)) for i in range(B)]
    assert abs(sum(loss for loss, _ in parts) / whole - 1) < 1e-6
    assert torch.allclose(sum(g for _, g in parts), grad, atol=1e-6, rtol=1e-5)


def test_cross_entropy_mix_equals_torch():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(4))
    labels[:, -1] = -100
    h, w = _leaves(student_h, student_w)
    parts = distillation_loss(
        h, w, teacher_h, teacher_w, labels=labels, ce_weight=0.25, temperature=2.0, chunk_tokens=16
    )
    parts.loss.backward()
    h_, w_ = _leaves(student_h, student_w)
    ce = torch.nn.functional.cross_entropy((h_ @ w_.T).flatten(0, 1), labels.flatten(), ignore_index=-100)
    kl = kl_from_hidden(h_, w_, teacher_h, teacher_w, temperature=2.0)
    (0.75 * kl + 0.25 * ce).backward()
    assert parts.labelled == B * (T - 1) and parts.tokens == B * T
    assert parts.ce_sum.item() / parts.labelled == pytest.approx(ce.item(), rel=1e-6)
    assert parts.loss.item() == pytest.approx((0.75 * kl + 0.25 * ce).item(), rel=1e-6)
    assert torch.allclose(h.grad, h_.grad, atol=1e-6) and torch.allclose(w.grad, w_.grad, atol=1e-6)


def test_bf16_autocast_accumulates_in_fp32():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    expected, _, grad_w = _reference(student_h, student_w, teacher_h, teacher_w, 1.0, 1.0, B * T)
    h, w = _leaves(student_h, student_w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kl_from_hidden(h, w, teacher_h, teacher_w, chunk_tokens=16)
    loss.backward()
    assert loss.dtype == w.grad.dtype == torch.float32
    assert abs(loss.item() / expected - 1) < 1e-5
    assert (w.grad - grad_w).abs().max() < 1e-6


def test_bf16_hidden_states_give_bf16_gradients():
    student_h, student_w, teacher_h, teacher_w = _inputs(dtype=torch.bfloat16)
    expected, grad_h, _ = _reference(student_h, student_w, teacher_h, teacher_w, 1.0, 1.0, B * T)
    h, w = _leaves(student_h, student_w)
    loss = kl_from_hidden(h, w, teacher_h, teacher_w)
    loss.backward()
    assert loss.dtype == torch.float32 and h.grad.dtype == w.grad.dtype == torch.bfloat16
    assert abs(loss.item() / expected - 1) < 1e-5
    assert (h.grad - grad_h).abs().max() < 1e-2 * grad_h.abs().max()


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_logits_of_all_tokens_never_exist(masked):
    tokens, vocabulary, width, chunk = 512, 1000, 8, 32
    generator = torch.Generator().manual_seed(0)
    h, w, th, tw = (
        torch.randn(*s, generator=generator)
        for s in ((tokens, width), (vocabulary, width), (tokens, 6), (vocabulary, 6))
    )
    mask = torch.arange(tokens) % 3 != 0 if masked else None
    labels = torch.arange(tokens)
    h.requires_grad_()
    w.requires_grad_()
    with _Largest() as seen:
        distillation_loss(h, w, th, tw, mask, labels=labels, ce_weight=0.5, chunk_tokens=chunk).loss.backward()
    assert seen.numel == chunk * vocabulary
    with _Largest() as naive:
        (h @ w.T).log_softmax(-1).sum().backward()
    assert naive.numel == tokens * vocabulary


def test_frozen_head_and_no_grad_skip_gradients():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    (h,) = _leaves(student_h)
    kl_from_hidden(h, student_w, teacher_h, teacher_w).backward()
    assert h.grad is not None and student_w.grad is None
    with torch.no_grad():
        assert not kl_from_hidden(h, student_w, teacher_h, teacher_w).requires_grad


def test_all_tokens_masked_give_zero():
    student_h, student_w, teacher_h, teacher_w = _inputs()
    h, w = _leaves(student_h, student_w)
    loss = kl_from_hidden(h, w, teacher_h, teacher_w, torch.zeros(B, T))
    loss.backward()
    assert loss.item() == 0.0 and (h.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_w": torch.zeros(V + 24, D_T)}, "vocabulary: 1000 and 1024"),
        ({"teacher_h": torch.zeros(B, T + 1, D_T)}, "positions differ"),
        ({"reduction": "mean"}, "token_mean, batch_sum"),
        ({"temperature": 0.0}, "temperature"),
        ({"ce_weight": 0.5}, "labels"),
        (
            {"student_h": torch.zeros(B * T, D_S), "teacher_h": torch.zeros(B * T, D_T), "reduction": "batch_sum"},
            "sequences",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    names = ("student_h", "student_w", "teacher_h", "teacher_w")
    arguments = dict(zip(names, _inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        kl_from_hidden(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_waits_for_the_gpu(masked):
    student_h, student_w, teacher_h, teacher_w = (tensor.cuda() for tensor in _inputs())
    mask = (torch.rand(B, T) > 0.3).cuda() if masked else None
    labels = torch.randint(0, V, (B, T)).cuda()
    h, w = _leaves(student_h, student_w)
    distillation_loss(h, w, teacher_h, teacher_w, mask, labels=labels, ce_weight=0.5).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        distillation_loss(h, w, teacher_h, teacher_w, mask, labels=labels, ce_weight=0.5).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reduction", ["token_mean", "batch_sum"])
def test_masks_on_a_gpu_equal_masks_on_a_cpu(reduction):
    """A CPU drops masked rows, a GPU gives them weight 0."""
    tensors = _inputs()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.4
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
    results = []
    for device in ("cpu", "cuda"):
        h, w, *teacher = (tensor.to(device) for tensor in _leaves(*tensors))
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        parts = distillation_loss(
            h, w, *teacher, mask.to(device), reduction, 1.5, labels=labels.to(device), ce_weight=0.3
        )
        parts.loss.backward()
        results.append([*parts[:3], h.grad, w.grad, parts.tokens, parts.labelled])
    for cpu, cuda in zip(*results, strict=True):
        assert torch.allclose(torch.as_tensor(cpu).double(), torch.as_tensor(cuda).cpu().double(), rtol=2e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk", [16, 4096])
def test_bf16_autocast_on_a_gpu(chunk):
    """Products of bf16 operands: equal to the reference on operands rounded to bf16, sums in fp32."""
    rounded = [tensor.bfloat16().float() for tensor in _inputs()]
    expected, grad_h, grad_w = _reference(*rounded, 1.0, 1.0, B * T)
    student_h, student_w, teacher_h, teacher_w = (tensor.cuda() for tensor in rounded)
    h, w = _leaves(student_h, student_w)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = kl_from_hidden(h, w, teacher_h, teacher_w, chunk_tokens=chunk)
    loss.backward()
    assert abs(loss.item() / expected - 1) < 1e-4
    assert (h.grad.cpu() - grad_h).abs().max() < 1e-2 * grad_h.abs().max()
    assert (w.grad.cpu() - grad_w).abs().max() < 1e-2 * grad_w.abs().max()
    h, w = _leaves(student_h, student_w)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        equal = kl_from_hidden(h, w, student_h, student_w, chunk_tokens=chunk)
    equal.backward()
    assert equal.item() == 0.0 and (h.grad == 0).all() and (w.grad == 0).all()
