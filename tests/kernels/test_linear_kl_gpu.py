"""linear_kl on a CUDA device: against fp64, beside eager bf16's error, at the tiles in use, and inside a CUDA graph."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_cases import relative_error, requires_cuda
from linear_kl_cases import expected, inputs, leaves, row_options
from posttrain_kernels.linear_kl import DIVERGENCES, chunked, linear_kl, linear_kl_reference

pytestmark = [pytest.mark.gpu, requires_cuda]

# Below this eager is right by luck (a loss is one number), and there is nothing to compare with.
FLOOR = 1e-4


def _case(seed):
    draw = random.Random(seed)
    n, v = draw.randint(1, 700), draw.choice([37, 1000, 2048, 4097, 8192, 12345, 32000, draw.randint(50, 20000)])
    d_s, d_t = draw.choice([64, 128, 576]), draw.choice([64, 192, 512])
    options = {
        "divergence": draw.choice(DIVERGENCES),
        "beta": draw.choice([0.1, 0.5, 0.9]),
        "temperature": draw.choice([1.0, 1.0, 0.7, 2.0]),
    }
    options |= row_options(n, v, seed, masked=draw.random() < 0.5, labelled=draw.random() < 0.4)
    chunk = draw.choice([None, 128, 100, 256])
    return (n, v, d_s, d_t), options, chunk


def _cuda(options):
    return {k: o.cuda() if isinstance(o, torch.Tensor) else o for k, o in options.items()}


def _fp64(tensors, options):
    return expected([tensor.cuda() for tensor in tensors], **_cuda(options))


def _ours(tensors, options, **more):
    student_h, student_w, *teacher = leaves([tensor.cuda() for tensor in tensors])
    result = linear_kl(student_h, student_w, *teacher, **_cuda(options), **more)
    result.loss.backward()
    return result, student_h.grad, student_w.grad


def _eager(tensors, options):
    """What a training loop without a fused loss does: bf16 logits, fp32 softmax, autograd."""
    student_h, student_w, *teacher = leaves([tensor.cuda() for tensor in tensors])
    logits = (student_h @ student_w.T).float(), (teacher[0] @ teacher[1].T).float()
    loss, *_ = _reference_of_logits(*logits, **_cuda(options))
    loss.backward()
    return loss.detach(), student_h.grad, student_w.grad


def _reference_of_logits(student, teacher, **options):
    class Given:
        """Stands for a hidden state whose product with any head is the given logits."""

        def __init__(self, logits):
            self.logits = logits

        def __matmul__(self, _):
            return self.logits

    class Head:
        T = None

    return linear_kl_reference(Given(student), Head, Given(teacher), Head, **options)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(50))
def test_bf16_error_within_one_and_a_half_of_eager(seed, logits_dtype, poison_empty):
    shape, options, chunk = _case(seed)
    tensors = inputs(*shape, seed=seed, dtype=torch.bfloat16)
    loss, values, _, grad_h, grad_w = _fp64(tensors, options)
    result, ours_h, ours_w = _ours(tensors, options, chunk_tokens=chunk, logits_dtype=logits_dtype)
    eager_loss, eager_h, eager_w = _eager(tensors, options)
    assert ours_h.dtype == ours_w.dtype == torch.bfloat16
    assert relative_error(result.divergence, values) < 2e-2
    for ours, eager, reference in (
        (result.loss, eager_loss, loss),
        (ours_h, eager_h, grad_h),
        (ours_w, eager_w, grad_w),
    ):
        assert relative_error(ours, reference) <= 1.5 * relative_error(eager, reference) + FLOOR


@pytest.mark.parametrize("seed", range(12))
def test_fp32_equals_fp64(seed, poison_empty):
    shape, options, chunk = _case(100 + seed)
    tensors = inputs(*shape, seed=seed)
    loss, values, ce, grad_h, grad_w = _fp64(tensors, options)
    result, ours_h, ours_w = _ours(tensors, options, chunk_tokens=chunk)
    assert relative_error(result.loss, loss) < 1e-5 and relative_error(result.divergence, values) < 1e-5
    assert relative_error(ours_h, grad_h) < 1e-4 and relative_error(ours_w, grad_w) < 1e-4
    if ce is not None:
        assert relative_error(result.cross_entropy, ce) < 1e-5


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_tiles_in_use(divergence, logits_dtype, poison_empty):
    """A vocabulary of many whole tiles and a ragged one; two runs agree to the bit (a race would not)."""
    tensors = inputs(300, 49153, 64, 96, dtype=torch.bfloat16)
    options = row_options(300, 49153, masked=True, labelled=True) | {"divergence": divergence, "temperature": 1.3}
    _, _, _, grad_h, grad_w = _fp64(tensors, options)
    first, second = (_ours(tensors, options, chunk_tokens=128, logits_dtype=logits_dtype) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
    assert relative_error(first[1], grad_h) < 2e-2 and relative_error(first[2], grad_w) < 2e-2


def test_fp64_on_a_gpu_takes_the_torch_step():
    tensors = inputs(9, 101, 8, 12, dtype=torch.float64)
    loss, _, _, grad_h, grad_w = _fp64(tensors, {})
    result, ours_h, ours_w = _ours(tensors, {})
    assert abs(result.loss - loss) < 1e-10 and (ours_h - grad_h).abs().max() < 1e-10
    assert (ours_w - grad_w).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("logits_dtype", "of_loss", "of_gradient"), [(torch.float32, 1e-4, 4e-3), (torch.bfloat16, 1e-3, 1e-2)]
)
def test_autocast_with_fp32_weights_accumulates_in_fp32(logits_dtype, of_loss, of_gradient):
    """fp32 master weights: bf16 operands, an fp32 gradient whose sum over many chunks is not rounded."""
    tensors = inputs(2048, 500, 64, 96)
    with torch.autocast("cuda", torch.bfloat16):
        result, _, ours_w = _ours(tensors, {}, chunk_tokens=128, logits_dtype=logits_dtype)
    rounded = [tensor.bfloat16().float() for tensor in tensors]
    loss, _, _, _, grad_w = _fp64(rounded, {})
    assert ours_w.dtype == torch.float32 and abs(result.loss / loss - 1) < of_loss
    assert relative_error(ours_w, grad_w) < of_gradient


def test_bf16_without_triton_takes_the_torch_step(monkeypatch):
    monkeypatch.setattr(chunked, "use_triton", lambda *_: False)
    tensors = inputs(300, 1000, 64, 96, dtype=torch.bfloat16)
    loss, _, _, grad_h, grad_w = _fp64(tensors, {})
    result, ours_h, ours_w = _ours(tensors, {}, chunk_tokens=128)
    assert ours_h.dtype == ours_w.dtype == torch.bfloat16 and abs(result.loss / loss - 1) < 1e-4
    assert relative_error(ours_h, grad_h) < 4e-3 and relative_error(ours_w, grad_w) < 4e-3


def test_rows_left_out_may_hold_nan(poison_empty):
    tensors = inputs(300, 5000, 64, 96, dtype=torch.bfloat16)
    options = row_options(300, 5000, masked=True, labelled=True)
    _, _, _, grad_h, grad_w = _fp64(tensors, options)
    for hidden in (tensors[0], tensors[2]):
        hidden[~options["mask"]] = float("nan")
    result, ours_h, ours_w = _ours(tensors, options)
    assert result.loss.isfinite() and relative_error(ours_h, grad_h) < 2e-2 and relative_error(ours_w, grad_w) < 2e-2


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_cuda_graph_replays_the_same_numbers(divergence):
    tensors = [tensor.cuda() for tensor in inputs(300, 5000, 64, 96, dtype=torch.bfloat16)]
    options = _cuda(row_options(300, 5000, masked=True, labelled=True)) | {"divergence": divergence}
    student_h, student_w, *teacher = leaves(tensors)

    def step():
        result = linear_kl(student_h, student_w, *teacher, chunk_tokens=128, **options)
        return result.loss, *torch.autograd.grad(result.loss, (student_h, student_w))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = inputs(300, 5000, 64, 96, seed=1, dtype=torch.bfloat16)
    with torch.no_grad():
        for place, value in zip((student_h, student_w, *teacher), fresh, strict=True):
            place.copy_(value)
    graph.replay()
    for out, plain in zip(captured, step(), strict=True):
        assert torch.allclose(out.float(), plain.float(), rtol=1e-2, atol=1e-4)


def test_memory_at_a_large_vocabulary():
    """Bytes beyond the inputs: the budget for logits, the head's gradient, and little else."""
    n, v, d = 1024, 128256, 256
    tensors = [tensor.cuda() for tensor in inputs(n, v, d, d, dtype=torch.bfloat16)]
    student_h, student_w, *teacher = leaves(tensors)
    linear_kl(student_h, student_w, *teacher).loss.backward()
    student_h.grad = student_w.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_kl(student_h, student_w, *teacher).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < chunked.CHUNK_BYTES + student_w.nbytes + 4 * student_h.nbytes + 2**20
