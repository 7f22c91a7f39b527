"""`ssd_scan` and `ssd_step` on CPU against the recurrence written out in numpy fp64, and its gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import posttrain_kernels.ssd_scan as package
import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.ssd_scan import ssd_scan, ssd_scan_reference, ssd_step, ssd_step_reference

import posttrain.models.upcycled as upcycled

B, T, H, P, N = 2, 37, 8, 5, 6
GROUPS = [(8, 8, 8), (8, 1, 1), (8, 2, 2), (2, 2, 8), (4, 4, 8), (1, 2, 4)]
"""Heads of x, b and c: stock with n_groups H, 1 and 2; shared values and keys of grouped-query attention; all mixed."""


def case(groups=(2, 2, 8), *, length=T, dtype=torch.float64, seed=0, decay=1.0):
    """x, dt, a, b, c, d and a state; `decay` scales how fast heads forget."""
    h_x, h_b, h_c = groups
    x, b, c = (
        randn(B, length, h, w, seed=seed + i, dtype=dtype) for i, (h, w) in enumerate([(h_x, P), (h_b, N), (h_c, N)])
    )
    dt = torch.nn.functional.softplus(randn(B, length, H, seed=seed + 3, dtype=dtype))
    a = -decay * randn(H, seed=seed + 4, dtype=dtype).exp()
    return x, dt, a, b, c, randn(H, seed=seed + 5, dtype=dtype), randn(B, H, P, N, seed=seed + 6, dtype=dtype)


def at(tensors, tokens):
    """The same inputs for one token or some."""
    x, dt, a, b, c, d, state = tensors
    return x[:, tokens], dt[:, tokens], a, b[:, tokens], c[:, tokens], d, state


def oracle(x, dt, a, b, c, d=None, initial_state=None, documents=None):
    """Every output as the sum over its own document's past, exponents summed one by one; no recurrence, no chunks."""
    x, dt, a, b, c = (tensor.double().numpy() for tensor in (x, dt, a, b, c))
    rows, length, heads = dt.shape
    y, state = np.zeros((rows, length, heads, x.shape[-1])), np.zeros((rows, heads, x.shape[-1], b.shape[-1]))
    for row in range(rows):
        names = [0] * length if documents is None else documents[row].tolist()
        first = [max([0, *(u for u in range(1, t + 1) if names[u] != names[u - 1])]) for t in range(length)]
        for h in range(heads):
            head = [h // (heads // part.shape[2]) for part in (x, b, c)]
            for t in range(length):
                held = np.zeros(state.shape[2:])
                for u in range(first[t], t + 1):
                    weight = np.exp(sum(dt[row, k, h] * a[h] for k in range(u + 1, t + 1))) * dt[row, u, h]
                    held += weight * np.outer(x[row, u, head[0]], b[row, u, head[1]])
                if initial_state is not None and first[t] == 0:
                    held += np.exp(sum(dt[row, : t + 1, h]) * a[h]) * initial_state[row, h].double().numpy()
                y[row, t, h] = held @ c[row, t, head[2]]
                if d is not None:
                    y[row, t, h] += float(d[h]) * x[row, t, head[0]]
            state[row, h] = held
    return torch.from_numpy(y), torch.from_numpy(state)


def boundaries():
    """Documents of both rows; an id comes back later (a third document), one is a single token."""
    row = torch.tensor([3] * 11 + [4] + [3] * 9 + [7] * 16)
    return torch.stack([row, torch.tensor([0] * 16 + [1] * 21)])


@pytest.mark.parametrize("documents", [None, boundaries()], ids=["one", "packed"])
@pytest.mark.parametrize("chunk", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_equals_the_sum_written_out(groups, chunk, documents):
    x, dt, a, b, c, d, state = case(groups)
    expected = oracle(x, dt, a, b, c, d, state, documents)
    for scan, options in ((ssd_scan, {"chunk": chunk}), (ssd_scan_reference, {})):
        found = scan(x, dt, a, b, c, d, initial_state=state, documents=documents, **options)
        assert relative_error(found[0], expected[0]) < 1e-12 and relative_error(found[1], expected[1]) < 1e-12


def test_without_skip_and_state():
    x, dt, a, b, c, _, _ = case()
    expected = oracle(x, dt, a, b, c)
    for scan in (ssd_scan, ssd_scan_reference):
        for out, wanted in zip(scan(x, dt, a, b, c), expected, strict=True):
            assert relative_error(out, wanted) < 1e-12


@pytest.mark.parametrize("decay", [1e-4, 1.0, 60.0])
@pytest.mark.parametrize("chunk", [16, 64])
def test_fp32_keeps_slow_and_fast_decays(decay, chunk):
    wide = case(decay=decay)
    expected = oracle(*wide[:6], wide[6])
    x, dt, a, b, c, d, state = (tensor.float() for tensor in wide)
    y, end = ssd_scan(x, dt, a, b, c, d, initial_state=state, chunk=chunk)
    assert y.dtype == end.dtype == torch.float32
    # `a` and `dt` are rounded themselves: a decay over k tokens is off by k · dt · a roundings.
    assert relative_error(y, expected[0]) < 2e-6 and relative_error(end, expected[1]) < 2e-6


def test_neighbours_after_a_strong_decay():
    """fp32 sums of large exponents lose the small differences of neighbours: outputs were off by percents."""
    x, dt, a, b, c, _, _ = case((8, 8, 8), dtype=torch.float32)
    dt = torch.full_like(dt, 1e-3)
    dt[:, :20] = 40.0
    a = torch.full_like(a, -16.0)
    y, _ = ssd_scan(x, dt, a, b, c, chunk=64)
    assert relative_error(y[:, 20:], oracle(x, dt, a, b, c)[0][:, 20:]) < 1e-6


@pytest.mark.parametrize("chunk", [4, 8, 16, 37])
def test_parts_with_a_carried_state_equal_the_whole(chunk):
    x, dt, a, b, c, d, state = case(dtype=torch.float32)
    whole, end = ssd_scan(x, dt, a, b, c, d, initial_state=state)
    outputs, carried = [], state
    for part in torch.arange(31).split([5, 17, 9]):
        y, carried = ssd_scan(
            *(tensor[:, part] for tensor in (x, dt)), a, b[:, part], c[:, part], d, initial_state=carried, chunk=chunk
        )
        outputs.append(y)
    carried = carried.clone()
    for token in range(31, T):  # single steps end it
        outputs.append(ssd_step(x[:, token], dt[:, token], a, b[:, token], c[:, token], carried, d)[:, None])
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-6 and relative_error(carried, end) < 1e-6


def test_packed_documents_equal_documents_one_by_one():
    x, dt, a, b, c, d, _ = case()
    documents = boundaries()
    packed, end = ssd_scan(x, dt, a, b, c, d, documents=documents, chunk=8)
    for row, starts in enumerate(([0, 11, 12, 21, T], [0, 16, T])):
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            part = (slice(row, row + 1), slice(start, stop))
            single, state = ssd_scan(x[part], dt[part], a, b[part], c[part], d)
            assert relative_error(packed[part], single) < 1e-12
        assert relative_error(end[row : row + 1], state) < 1e-12


def test_a_token_of_no_length_is_not_there():
    x, dt, a, b, c, _, state = case()
    dt = dt.clone()
    dt[:, :6] = 0
    y, end = ssd_scan(x, dt, a, b, c, initial_state=state)
    expected, state = ssd_scan(x[:, 6:], dt[:, 6:], a, b[:, 6:], c[:, 6:], initial_state=state)
    assert relative_error(y[:, 6:], expected) < 1e-12 and relative_error(end, state) < 1e-12


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    x, dt, a, b, c, d, state = at(case((2, 4, 8)), slice(7))
    x, dt, b, c = (tensor[:1] for tensor in (x, dt, b, c))
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, dt, a, b, c, d, state[:1])]
    documents = boundaries()[:1, 8:15] if packed else None

    def run(x, dt, a, b, c, d, state):
        return ssd_scan(x, dt, a, b, c, d, initial_state=state, documents=documents, chunk=3)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_gradients_equal_those_of_the_recurrence():
    found = []
    for scan in (ssd_scan, ssd_scan_reference):
        leaves = [tensor.requires_grad_() for tensor in case()]
        y, end = scan(*leaves[:6], initial_state=leaves[6], documents=boundaries())
        (y * randn(*y.shape, seed=9, dtype=y.dtype)).sum().add(end.pow(2).sum()).backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 1e-11


def test_bf16_inputs_under_autocast_keep_an_fp32_state():
    x, dt, a, b, c, d, state = case()
    small = [tensor.bfloat16() for tensor in (x, b, c)]
    expected, end = oracle(small[0], dt.float(), a.float(), *small[1:], d.float(), state.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, found = ssd_scan(small[0], dt.float(), a.float(), *small[1:], d.float(), initial_state=state.float())
    assert (y.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(found, end) < 1e-6, "the state was rounded to bf16 on the way"
    assert relative_error(y, expected) < 4e-3


def test_a_step_updates_the_state_in_place():
    x, dt, a, b, c, d, state = at(case(), 0)
    expected, after = ssd_step_reference(x, dt, a, b, c, state, d)
    y = ssd_step(x, dt, a, b, c, state, d)
    assert relative_error(y, expected) < 1e-14 and relative_error(state, after) < 1e-14


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.ones(B, T, 3, P)}, "3 heads of x do not divide"),
        ({"b": torch.ones(B, T, 2, N + 1)}, "do not fit x"),
        ({"dt": torch.ones(B, T + 1, H)}, "dt"),
        ({"a": torch.ones(H + 1)}, "a .* is not one number"),
        ({"d": torch.ones(1)}, "d .* is not one number"),
        ({"initial_state": torch.ones(B, H, N, P)}, "the state"),
        ({"documents": torch.zeros(B, T)}, "documents .* must be integers"),
        ({"documents": torch.zeros(B, T, dtype=torch.long, device="meta")}, "documents are on meta, x is on cpu"),
        ({"x": torch.zeros(B, T, 0, 4)}, "0 heads of x"),
        ({"documents": torch.zeros(B, T + 1, dtype=torch.long)}, "documents"),
        ({"chunk": 0}, "chunks of 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changes, words):
    x, dt, a, b, c, d, state = case(dtype=torch.float32)
    arguments = {"x": x, "dt": dt, "a": a, "b": b, "c": c, "d": d, "initial_state": state}
    with pytest.raises(ValueError, match=words):
        ssd_scan(**{**arguments, **changes})


def test_a_step_refuses_a_bf16_state_and_gradients():
    x, dt, a, b, c, _, state = at(case(), 0)
    with pytest.raises(ValueError, match="fp32"):
        ssd_step(x, dt, a, b, c, state.bfloat16())
    with pytest.raises(RuntimeError, match="no gradient"):
        ssd_step(x, dt, a.requires_grad_(), b, c, state)


def test_saved_models_carry_the_same_code():
    ours = Path(package.__file__).with_name("torch_scan.py").read_text(encoding="utf-8")
    carried = Path(upcycled.__file__).with_name("ssd_upcycled.py").read_text(encoding="utf-8")
    assert ours == carried, "copy kernels/posttrain_kernels/ssd_scan/torch_scan.py to models/upcycled/ssd_upcycled.py"
