"""The row step of `linear_kl` in Triton: per-token values, and the gradient to the student's logits.

Logarithms are base 2 inside (`exp2` is the instruction, the temperature folds into one factor). With
x = logits/T · log2 e and p = 2^(x − L), L = log2 Σ 2^x, the values are, in nats after a factor ln 2,

    forward  Σ t (x_t − x_s) − L_t + L_s              gradient  w/T (s − t)
    reverse  Σ s (x_s − x_t) − L_s + L_t              gradient  w/T s (ln s/t − value)
    jsd      β Σ t log2(t/m) + (1−β) Σ s log2(s/m)    gradient  w/T (1−β) s (ln s/m − Σ s ln s/m),  m = β t + (1−β) s
    CE       L¹ − x¹_label, L¹ at temperature 1       gradient  v (p¹ − onehot)

A first pass takes both rows' L, the sum, and L¹ (`_stats`); jsd needs a second (`_jsd`); the last (`_apply`) writes the
gradient. A row is one program. Several programs a row, meeting between launches, were slower on an H200 at every size
tried, also in groups of rows that stay in the L2 cache (docs/results/log.md).

Online sums are kept by lane: a tile is [ROWS, LANES] consecutive entries with a thread's entries along ROWS, so that
the maximum is taken in registers and rescaling costs one exp2 per ROWS entries; lanes meet once, after the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# What stands for an entry beyond the end (times scale), and the maximum of no entries. At the temperatures accepted
# (`inputs.TEMPERATURES`; it would do from 4.3e-5 to 1.4e4) both are finite and the second is the larger: differences
# are numbers (0 beyond the end) and 2^(beyond − maximum) is 0.
_BEYOND = tl.constexpr(-1.0e34)
_FLOOR = tl.constexpr(-1.0e30)
_TINY = tl.constexpr(1.0e-37)


@triton.jit
def _load(row, at, end, scale):
    """Logits at `at` in log2 units."""
    return tl.load(row + at, mask=at < end, other=_BEYOND).to(tl.float32) * scale


@triton.jit
def _tile(ROWS: tl.constexpr, LANES: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _stats(
    s_row, t_row, begin, end, scale, temperature,
    KIND: tl.constexpr, TEMPERED_CE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Online (m_s, l_s, m_t, l_t, g, l_1) of entries [begin, end), each [LANES]; l = Σ 2^(x − m), g the gap's sum."""
    m_s = tl.full([LANES], _FLOOR, tl.float32)
    m_t = tl.full([LANES], _FLOOR, tl.float32)
    l_s = tl.zeros([LANES], tl.float32)
    l_t = tl.zeros([LANES], tl.float32)
    g = tl.zeros([LANES], tl.float32)
    l_1 = tl.zeros([LANES], tl.float32)
    for start in range(begin, end, ROWS * LANES):
        at = start + _tile(ROWS, LANES)
        x_s = _load(s_row, at, end, scale)
        x_t = _load(t_row, at, end, scale)
        n_s = tl.maximum(m_s, tl.max(x_s, axis=0))
        n_t = tl.maximum(m_t, tl.max(x_t, axis=0))
        e_s = tl.exp2(x_s - n_s[None, :])
        e_t = tl.exp2(x_t - n_t[None, :])
        c_s = tl.exp2(m_s - n_s)
        c_t = tl.exp2(m_t - n_t)
        l_s = l_s * c_s + tl.sum(e_s, axis=0)
        l_t = l_t * c_t + tl.sum(e_t, axis=0)
        gap = x_t - x_s
        if KIND == 0:
            g = g * c_t + tl.sum(e_t * gap, axis=0)
        if KIND == 1:
            g = g * c_s - tl.sum(e_s * gap, axis=0)
        if TEMPERED_CE:
            l_1 = l_1 * tl.exp2((m_s - n_s) * temperature)
            l_1 += tl.sum(tl.exp2((x_s - n_s[None, :]) * temperature), axis=0)
        m_s = n_s
        m_t = n_t
    return m_s, l_s, m_t, l_t, g, l_1


@triton.jit
def _meet(m_s, l_s, m_t, l_t, g, l_1, temperature, KIND: tl.constexpr, TEMPERED_CE: tl.constexpr):
    """(L_s, L_t, Σ gap under its distribution, L¹) from lanes."""
    top_s = tl.max(m_s, axis=0)
    top_t = tl.max(m_t, axis=0)
    c_s = tl.exp2(m_s - top_s)
    c_t = tl.exp2(m_t - top_t)
    sum_s = tl.sum(l_s * c_s, axis=0)
    sum_t = tl.sum(l_t * c_t, axis=0)
    lse_s = top_s + tl.log2(sum_s)
    lse_t = top_t + tl.log2(sum_t)
    gap = 0.0
    if KIND == 0:
        gap = tl.sum(g * c_t, axis=0) / sum_t
    if KIND == 1:
        gap = tl.sum(g * c_s, axis=0) / sum_s
    lse_1 = lse_s
    if TEMPERED_CE:
        lse_1 = top_s * temperature + tl.log2(tl.sum(l_1 * tl.exp2((m_s - top_s) * temperature), axis=0))
    return lse_s, lse_t, gap, lse_1


@triton.jit
def _log_mixture(s, t, beta):
    """log2 of β t + (1 − β) s; where both underflow it stays finite and is multiplied by 0."""
    return tl.log2(tl.maximum(beta * t + (1.0 - beta) * s, _TINY))


@triton.jit
def _jsd(s_row, t_row, begin, end, scale, lse_s, lse_t, beta, ROWS: tl.constexpr, LANES: tl.constexpr):
    """(Σ t log2 t/m, Σ s log2 s/m) of entries [begin, end), scalars."""
    to_t = tl.zeros([LANES], tl.float32)
    to_s = tl.zeros([LANES], tl.float32)
    for start in range(begin, end, ROWS * LANES):
        at = start + _tile(ROWS, LANES)
        a_s = _load(s_row, at, end, scale) - lse_s
        a_t = _load(t_row, at, end, scale) - lse_t
        s = tl.exp2(a_s)
        t = tl.exp2(a_t)
        log_m = _log_mixture(s, t, beta)
        to_t += tl.sum(t * (a_t - log_m), axis=0)
        to_s += tl.sum(s * (a_s - log_m), axis=0)
    return tl.sum(to_t, axis=0), tl.sum(to_s, axis=0)


@triton.jit
def _apply(
    s_row, t_row, o_row, begin, end, scale, temperature, lse_s, lse_t, lse_1, value, beta, weight, label_weight, label,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, TEMPERED_CE: tl.constexpr, BARRIER: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradient of entries [begin, end) to `o_row`, which may be the memory of `s_row` or of `t_row`.

    `value` is what the gradient subtracts, in log2 units: reverse KL, or Σ s log2 s/m.
    """
    factor = weight / temperature
    for start in range(begin, end, ROWS * LANES):
        at = start + _tile(ROWS, LANES)
        a_s = _load(s_row, at, end, scale) - lse_s
        a_t = _load(t_row, at, end, scale) - lse_t
        s = tl.exp2(a_s)
        if KIND == 0:
            grad = factor * (s - tl.exp2(a_t))
        if KIND == 1:
            grad = (factor * _LN2) * s * (a_s - a_t - value)
        if KIND == 2:
            gap = a_s - _log_mixture(s, tl.exp2(a_t), beta)
            grad = (factor * _LN2 * (1.0 - beta)) * s * (gap - value)
        if HAS_CE:
            p = s
            if TEMPERED_CE:
                p = tl.exp2((a_s + lse_s) * temperature - lse_1)
            grad += label_weight * (p - tl.where(at == label, 1.0, 0.0))
        if BARRIER:
            # bf16 over fp32: what this tile writes lies in what it, or an earlier tile, has read.
            tl.debug_barrier()
        tl.store(o_row + at, grad.to(o_row.dtype.element_ty), mask=at < end)


@triton.jit
def _zero(o_row, begin, end, ROWS: tl.constexpr, LANES: tl.constexpr):
    for start in range(begin, end, ROWS * LANES):
        at = start + _tile(ROWS, LANES)
        tl.store(o_row + at, tl.zeros([ROWS, LANES], tl.float32).to(o_row.dtype.element_ty), mask=at < end)


@triton.jit
def _label(label_ptr, label_weight_ptr, row, n):
    """(label, its weight, whether it counts); a label that is neither −100 nor a token makes the row NaN."""
    label = tl.load(label_ptr + row)
    counts = label != -100
    weight = tl.load(label_weight_ptr + row)
    broken = counts & ((label < 0) | (label >= n))
    weight = tl.where(counts, tl.where(broken, float("nan"), weight), 0.0)
    return tl.where(broken, 0, label), weight, counts


@triton.jit
def _cross_entropy(lse_1, x_label, temperature, weight, counts):
    """Nats; `x_label` is in log2 units at the KL's temperature."""
    ce = tl.where(counts, (lse_1 - x_label * temperature) * _LN2, 0.0)
    return tl.where(weight == weight, ce, float("nan"))


@triton.jit
def _value(lse_s, lse_t, gap, KIND: tl.constexpr):
    """KL in log2 units from the gap's mean."""
    if KIND == 0:
        return gap - lse_t + lse_s
    else:
        return gap - lse_s + lse_t


@triton.jit
def two_pass_kernel(
    s_ptr, t_ptr, o_ptr, s_stride, t_stride, o_stride,
    weight_ptr, keep_ptr, label_ptr, label_weight_ptr, value_ptr, ce_ptr,
    n, temperature, beta,
    KIND: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_CE: tl.constexpr, TEMPERED: tl.constexpr, GRAD: tl.constexpr,
    BARRIER: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program a row: values, and with GRAD the gradient."""
    # 64 bits: rows · stride passes 2^31 from 16,744 rows of a 128,256 vocabulary on.
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * s_stride
    t_row = t_ptr + row * t_stride
    o_row = o_ptr + row * o_stride
    alive = True
    if HAS_KEEP:
        alive = tl.load(keep_ptr + row) != 0
    scale = _LOG2E / temperature
    if alive:
        label = -1
        label_weight = 0.0
        x_label = 0.0
        if HAS_CE:
            label, label_weight, counts = _label(label_ptr, label_weight_ptr, row, n)
            # Before the gradient goes over it.
            x_label = tl.load(s_row + tl.where(counts, label, 0)).to(tl.float32) * scale
        m_s, l_s, m_t, l_t, g, l_1 = _stats(
            s_row, t_row, 0, n, scale, temperature, KIND, HAS_CE and TEMPERED, ROWS, LANES
        )
        lse_s, lse_t, gap, lse_1 = _meet(m_s, l_s, m_t, l_t, g, l_1, temperature, KIND, HAS_CE and TEMPERED)
        if KIND == 2:
            to_t, subtract = _jsd(s_row, t_row, 0, n, scale, lse_s, lse_t, beta, ROWS, LANES)
            value = beta * to_t + (1.0 - beta) * subtract
        else:
            value = _value(lse_s, lse_t, gap, KIND)
            subtract = value
        tl.store(value_ptr + row, value * _LN2)
        if HAS_CE:
            tl.store(ce_ptr + row, _cross_entropy(lse_1, x_label, temperature, label_weight, counts))
        if GRAD:
            weight = tl.load(weight_ptr + row)
            _apply(
                s_row, t_row, o_row, 0, n, scale, temperature, lse_s, lse_t, lse_1, subtract, beta,
                weight, label_weight, label, KIND, HAS_CE, HAS_CE and TEMPERED, BARRIER, ROWS, LANES,
            )  # fmt: skip
    else:
        tl.store(value_ptr + row, 0.0)
        if HAS_CE:
            tl.store(ce_ptr + row, 0.0)
        if GRAD:
            _zero(o_row, 0, n, ROWS, LANES)
