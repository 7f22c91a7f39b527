"""Grids, strides and buffers of the scan's Triton kernels, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inference import unit_stride
from .grad_kernels import chunk_grad_kernel, segment_grad_kernel
from .scan_kernels import chunk_scan_kernel, pass_states_kernel, step_kernel
from .tiles import Plan, Tile, choose_plan

PASS_BLOCK = 512
"""State elements of a program that joins segments."""
STEP_ELEMENTS = 1024
"""State elements of a program of one step: 16 loads of 16 bytes a warp and lane in flight, and many programs."""


@dataclass(frozen=True)
class Scan:
    """The inputs of a scan as the kernels take them: last dimensions dense, types of products chosen.

    `operands` is the type of operands of products, of chunk states and of gradients before the sums over shared heads.
    Where it is fp32 (see `product_type`), fp16 inputs are multiplied as tf32, which has their precision and fp32's
    range, since states have no bound; others as three tf32 products, fp32 to the last bits.
    """

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    documents: Tensor | None
    plan: Plan
    operands: torch.dtype

    @classmethod
    def of(
        cls,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        documents: Tensor | None,
        chunk: int,
        plan: Plan | None = None,
        operands: torch.dtype | None = None,
    ) -> Scan:
        """Checks done; `plan` and `operands` in place of those that shapes and inputs choose."""
        x, b, c = (unit_stride(tensor) for tensor in (x, b, c))
        if documents is not None:
            documents = (documents.view(torch.int8) if documents.dtype == torch.bool else documents).contiguous()
        operands = operands or product_type(x, b, c)
        lines, (tokens, _, head) = dt.shape[0] * dt.shape[2], x.shape[1:]
        loaded = max(tensor.element_size() for tensor in (x, b, c))
        plan = plan or choose_plan(lines, tokens, head, b.shape[-1], operands.itemsize, chunk, loaded)
        return cls(x, dt, a.contiguous(), b, c, None if d is None else d.contiguous(), documents, plan, operands)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, T, H, P, N."""
        return *self.dt.shape, self.x.shape[-1], self.b.shape[-1]

    @cached_property
    def segment(self) -> int:
        """Tokens of a segment, a multiple of the chunks."""
        longest = max(tile.chunk for tile in (self.plan.forward, self.plan.states, self.plan.backward))
        return self.plan.segment or -(-self.sizes[1] // longest) * longest

    @cached_property
    def segments(self) -> int:
        """Parts of a row that run side by side."""
        return -(-self.sizes[1] // self.segment)

    @property
    def options(self) -> dict[str, object]:
        """What every kernel is compiled for."""
        _, _, heads, head, state = self.sizes
        element = tl.bfloat16 if self.operands == torch.bfloat16 else tl.float32
        precision = "tf32" if self.x.dtype == self.b.dtype == self.c.dtype == torch.float16 else "tf32x3"
        options = dict(H=heads, P=head, N=state, C_SHARE=heads // self.c.shape[2])
        return options | dict(PACKED=self.documents is not None, TYPE=element, PRECISION=precision)

    @property
    def shares(self) -> dict[str, int]:
        """Heads that share one of x and of b."""
        return {"X_SHARE": self.sizes[2] // self.x.shape[2], "B_SHARE": self.sizes[2] // self.b.shape[2]}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """x, dt, a, b, c, d, documents; a tensor that is not there is not read, and any pointer does."""
        d, documents = (self.a if tensor is None else tensor for tensor in (self.d, self.documents))
        return self.x, self.dt, self.a, self.b, self.c, d, documents

    @property
    def strides(self) -> tuple[int, ...]:
        """Rows, tokens and heads of x, dt, b and c."""
        return tuple(stride for tensor in (self.x, self.dt, self.b, self.c) for stride in tensor.stride()[:3])

    def states(self, *lead: int) -> Tensor:
        """An fp32 buffer of states [B, H, lead, P, N]."""
        rows, _, heads, head, state = self.sizes
        return torch.empty(rows, heads, *lead, head, state, dtype=torch.float32, device=self.x.device)


def scan_forward(scan: Scan, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [B, T, H, P], the last state [B, H, P, N], and the states [B, H, segments, P, N] before segments.

    The third is the initial state where a row is one segment.
    """
    rows, tokens, heads, head, _ = scan.sizes
    y = torch.empty(rows, tokens, heads, head, dtype=scan.x.dtype, device=scan.x.device)
    last, first = scan.states(), None if initial_state is None else initial_state.contiguous()
    if scan.segments > 1:
        local, decay = scan.states(scan.segments), y.new_empty(rows, heads, scan.segments, dtype=torch.float32)
        _launch_scan(scan, scan.plan.states, end=local, decay=decay)
        first = _pass_states(scan, local, decay, first, reverse=False)
    _launch_scan(scan, scan.plan.forward, first=first, y=y, end=last)
    return y, last, first


def scan_backward(
    scan: Scan, first: Tensor | None, grad_y: Tensor, grad_last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, a, b, c, d and the initial state, fp32 for a, d and the state, from those of y and the last.

    `first` as `scan_forward` returned it. The state before each chunk is computed anew, and its memory, of the size of
    x with all heads, is free after this: kept from the forward pass it would be there for every layer at once.
    """
    rows, tokens, heads, _, _ = scan.sizes
    grad_y = unit_stride(grad_y)
    grad_last = None if grad_last is None else grad_last.contiguous()
    tile, device = scan.plan.backward, scan.x.device
    before = chunk_states(scan, first)
    if scan.segments > 1:
        grad_last = _segment_gradients(scan, grad_y, grad_last)
    grad_x, grad_b, grad_c = (_gradient(scan, tensor) for tensor in (scan.x, scan.b, scan.c))
    grad_dt = torch.empty(rows, tokens, heads, dtype=scan.dt.dtype, device=device)
    grad_first = scan.states()
    grad_a, grad_d = (torch.empty(rows, heads, scan.segments, dtype=torch.float32, device=device) for _ in range(2))
    chunk_grad_kernel[(rows * heads, scan.segments)](
        *scan.tensors, before, grad_y, before if grad_last is None else grad_last,
        grad_x, grad_dt, grad_b, grad_c, grad_first, grad_a, grad_d,
        *scan.strides, *grad_y.stride()[:3], tokens, scan.segment, scan.segments,
        L=tile.chunk, LAST=grad_last is not None, FIRST=True, HAS_D=scan.d is not None,
        **scan.options, **scan.shares, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    shared = (_sum_heads(grad, like) for grad, like in ((grad_x, scan.x), (grad_b, scan.b), (grad_c, scan.c)))
    grad_x, grad_b, grad_c = shared
    return grad_x, grad_dt, grad_a.sum((0, 2)), grad_b, grad_c, grad_d.sum((0, 2)), grad_first


def chunk_states(scan: Scan, first: Tensor | None) -> Tensor:
    """The state before each chunk of `plan.states`, [B, H, chunks, N, P] in the type of products."""
    rows, tokens, heads, head, state = scan.sizes
    chunks = triton.cdiv(tokens, scan.plan.states.chunk)
    before = torch.empty(rows, heads, chunks, state, head, dtype=scan.operands, device=scan.x.device)
    _launch_scan(scan, scan.plan.states, first=first, states=before)
    return before


def step_in_place(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, d: Tensor | None) -> Tensor:
    """The Triton code behind `ssd_step`; checks done, the state's last dimension dense."""
    rows, heads, head, width = state.shape
    y = torch.empty(rows, heads, head, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x, b, c = (unit_stride(tensor) for tensor in (x, b, c))
    lanes = triton.next_power_of_2(width)
    block = max(1, min(triton.next_power_of_2(head), STEP_ELEMENTS // lanes))
    strides = (stride for tensor in (x, dt, b, c) for stride in tensor.stride()[:2])
    step_kernel[(rows * heads, triton.cdiv(head, block))](
        x, dt, a.contiguous(), b, c, a if d is None else d.contiguous(), state, y, *strides, *state.stride()[:3],
        H=heads, X_SHARE=heads // x.shape[1], B_SHARE=heads // b.shape[1], C_SHARE=heads // c.shape[1],
        P=head, N=width, BLOCK_P=block, BLOCK_N=lanes, HAS_D=d is not None, num_warps=2,
    )  # fmt: skip
    return y


def _launch_scan(
    scan: Scan,
    tile: Tile,
    *,
    first: Tensor | None = None,
    y: Tensor | None = None,
    states: Tensor | None = None,
    end: Tensor | None = None,
    decay: Tensor | None = None,
) -> None:
    """`chunk_scan_kernel` for the buffers that are given; `end` is of single segments where `decay` is given."""
    rows, tokens, heads, head, _ = scan.sizes
    absent = scan.a
    given = (absent if tensor is None else tensor for tensor in (first, y, states, end, decay))
    chunk_scan_kernel[(rows * heads * (head // tile.width), scan.segments)](
        *scan.tensors, *given, *scan.strides, tokens, scan.segment, scan.segments,
        L=tile.chunk, BLOCK_P=tile.width, OUTPUT=y is not None, STATES=states is not None, FIRST=first is not None,
        END=end is not None and decay is None, LOCAL=decay is not None, HAS_D=scan.d is not None,
        **scan.options, **scan.shares, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _pass_states(scan: Scan, local: Tensor, decay: Tensor, given: Tensor | None, *, reverse: bool) -> Tensor:
    """States before the segments (or, reverse, gradients after them) from what each segment gives by itself."""
    rows, _, heads, head, state = scan.sizes
    out = torch.empty_like(local)
    size = head * state
    pass_states_kernel[(rows * heads, triton.cdiv(size, PASS_BLOCK))](
        local, decay, local if given is None else given, out, size, scan.segments,
        REVERSE=reverse, GIVEN=given is not None, BLOCK=PASS_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def _segment_gradients(scan: Scan, grad_y: Tensor, grad_last: Tensor | None) -> Tensor:
    """Gradients [B, H, segments, P, N] of the states after the segments."""
    rows, tokens, heads, head, _ = scan.sizes
    tile = scan.plan.states
    local, decay = scan.states(scan.segments), scan.a.new_empty(rows, heads, scan.segments, dtype=torch.float32)
    _, dt, a, _, c, _, documents = scan.tensors
    segment_grad_kernel[(rows * heads * (head // tile.width), scan.segments)](
        dt, a, c, documents, grad_y, local, decay,
        *dt.stride(), *c.stride()[:3], *grad_y.stride()[:3], tokens, scan.segment, scan.segments,
        L=tile.chunk, BLOCK_P=tile.width, **scan.options, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _pass_states(scan, local, decay, grad_last, reverse=True)


def _gradient(scan: Scan, tensor: Tensor) -> Tensor:
    """A buffer [B, T, H, ·]: in the tensor's type where it has all heads, else in the type of products."""
    rows, tokens, heads, _, _ = scan.sizes
    kind = tensor.dtype if tensor.shape[2] == heads else scan.operands
    return torch.empty(rows, tokens, heads, tensor.shape[-1], dtype=kind, device=tensor.device)


def _sum_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of shared heads: the sum over those that share one, fp32 inside, always in the same order."""
    if gradient.shape[2] == like.shape[2]:
        return gradient
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


def product_type(x: Tensor, b: Tensor, c: Tensor) -> torch.dtype:
    """bf16 where x, b and c are, or under bf16 autocast on CUDA, as of any product; else fp32."""
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
    return torch.bfloat16 if autocast or x.dtype == b.dtype == c.dtype == torch.bfloat16 else torch.float32
