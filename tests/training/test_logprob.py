"""The seam over TRL's chunked head: equal to full logits in fp64, gradients too, and a clear word when TRL moves."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from posttrain.errors import StageError
from posttrain.training import logprob
from posttrain.training.logprob import plain_head, token_logprobs

VOCAB, WIDTH = 53, 12


def tensors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCAB, shape, generator=generator)


def full(hidden, weight, targets, temperature):
    """The definition, with all logits, in fp64."""
    log_p = (hidden.double() @ weight.double().t() / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (targets >= 0)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(9)
    pull = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return torch.autograd.grad(outputs, inputs, pull)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 1000), (0.7, 16), (2.5, 52)])
def test_outputs_and_gradients_equal_full_logits(shape, temperature, chunk_size):
    hidden, weight, targets = tensors(*shape)
    ours = token_logprobs(hidden, weight, targets, temperature, chunk_size=chunk_size)
    expected = full(hidden, weight, targets, temperature)
    for got, want in zip(ours, expected, strict=True):
        assert got.shape == shape and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=5e-6)
    got, want = gradients(ours, (hidden, weight)), gradients(expected, (hidden, weight))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_each_output_has_its_own_gradient():
    hidden, weight, targets = tensors(6)
    for index in range(2):
        got = gradients([token_logprobs(hidden, weight, targets, 1.3)[index]], (hidden, weight))
        want = gradients([full(hidden, weight, targets, 1.3)[index]], (hidden, weight))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_target_below_zero_gives_zero_and_no_gradient():
    hidden, weight, targets = tensors(5)
    targets[1:3] = -100
    out = token_logprobs(hidden, weight, targets)
    assert out.logprobs[1:3].tolist() == [0.0, 0.0] and (out.logprobs[[0, 3, 4]] < 0).all()
    (grad,) = torch.autograd.grad(out.logprobs.sum(), hidden)
    assert not grad[1:3].any() and grad[[0, 3, 4]].any(-1).all()


def test_a_target_that_is_no_token_gives_nan_and_no_gradient():
    hidden, weight, targets = tensors(5)
    targets[1], targets[3] = VOCAB, VOCAB + 1000
    out = token_logprobs(hidden, weight, targets, chunk_size=16)
    assert out.logprobs.isnan().tolist() == [False, True, False, True, False] and out.entropy.isfinite().all()
    (grad,) = torch.autograd.grad(out.logprobs.nansum(), hidden)
    assert grad.isfinite().all() and not grad[[1, 3]].any()


def test_without_entropy_the_logprobs_are_the_same():
    hidden, weight, targets = tensors(2, 4)
    alone = token_logprobs(hidden, weight, targets, 0.9, entropy=False)
    assert alone.entropy is None
    assert torch.equal(alone.logprobs, token_logprobs(hidden, weight, targets, 0.9).logprobs)
    assert alone.logprobs.grad_fn is not None


def test_more_tokens_than_a_tile_of_trl(monkeypatch):
    from trl.kernels import chunked_logprob

    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 4)
    hidden, weight, targets = tensors(11)
    ours, expected = token_logprobs(hidden, weight, targets, chunk_size=20), full(hidden, weight, targets, 1.0)
    got, want = gradients(ours, (hidden, weight)), gradients(expected, (hidden, weight))
    for one, other in zip((*ours, *got), (*expected, *want), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "targets", "temperature", "words"),
    [
        ((4, WIDTH), (5,), 1.0, "differ in positions"),
        ((2, 3, WIDTH), (6,), 1.0, "differ in positions"),
        ((4, WIDTH + 1), (4,), 1.0, "do not fit a head"),
        ((4, WIDTH), (4,), 0.0, "temperature must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(hidden, targets, temperature, words):
    with pytest.raises(ValueError, match=words):
        token_logprobs(torch.zeros(hidden), torch.zeros(VOCAB, WIDTH), torch.zeros(targets).long(), temperature)


def model(bias=False, **config):
    head = nn.Linear(4, 6, bias=bias)
    return SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace(**config), head=head)


def test_a_plain_head_is_its_weight():
    plain = model(final_logit_softcapping=None, logit_scale=1.0)
    assert plain_head(plain) is plain.head.weight


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"bias": True}, "a head with a bias"),
    ],
)
def test_capped_scaled_or_biased_logits_are_refused(options, words):
    with pytest.raises(StageError, match=words):
        plain_head(model(**options))


def test_the_installed_trl_has_the_known_signature():
    assert logprob._trl_function().__name__ == "ChunkedLogProbFunction"


def test_a_trl_with_another_signature_is_named(monkeypatch):
    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, temperature):
            return hidden

    monkeypatch.setattr("trl.kernels.ChunkedLogProbFunction", Moved)
    logprob._trl_function.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"TRL .* 'temperature'\); posttrain/training/logprob.py knows"):
            token_logprobs(*tensors(3))
    finally:
        logprob._trl_function.cache_clear()


def test_importing_the_seam_does_not_import_trl():
    code = "import sys; import posttrain.training.logprob; assert not any(m.startswith('trl') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
