"""Grids, strides and buffers of the scan's Triton kernels, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import nvidia_generation, on_own_device, shared_memory
from ..inference import unit_stride
from ..sizes import cdiv, next_power_of_2
from .grad_kernels import chunk_grad_kernel
from .scan_kernels import chunk_scan_kernel, step_kernel
from .state_kernels import chain_states_kernel, pass_states_kernel, sum_decays_kernel
from .tiles import Plan, Tile, choose_plan

PASS_BLOCK = 512
"""State elements of a program that joins segments."""
DECAY_HEADS = 16
"""Heads of a program that sums decays: neighbours in dt, of which whole sectors are read."""
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
        sizes = (lines, tokens, head, b.shape[-1], operands.itemsize, chunk, loaded)
        plan = plan or choose_plan(*sizes, None if is_hopper(x) else shared_memory(x.device))
        return cls(x, dt, a.contiguous(), b, c, None if d is None else d.contiguous(), documents, plan, operands)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, T, H, P, N."""
        return *self.dt.shape, self.x.shape[-1], self.b.shape[-1]

    @property
    def segments(self) -> int:
        """Parts of a row that run side by side."""
        tokens = self.sizes[1]
        return cdiv(tokens, self.plan.segment or tokens)

    @property
    def run(self) -> int:
        """Tokens that one program of `backward` walks through, a multiple of its chunks."""
        chunk = self.plan.backward.chunk
        return self.plan.run or self.plan.segment or cdiv(self.sizes[1], chunk) * chunk

    @property
    def runs(self) -> int:
        """Runs of a row."""
        return cdiv(self.sizes[1], self.run)

    def lengths(self, chunk: int) -> tuple[int, int, int]:
        """Chunks of a row, chunks of a segment, and segments."""
        chunks = cdiv(self.sizes[1], chunk)
        return chunks, self.plan.segment // chunk if self.plan.segment else chunks, self.segments

    @property
    def options(self) -> dict[str, object]:
        """What the kernels of chunks are compiled for."""
        _, _, heads, head, state = self.sizes
        element = tl.bfloat16 if self.operands == torch.bfloat16 else tl.float32
        precision = "tf32" if self.x.dtype == self.b.dtype == self.c.dtype == torch.float16 else "tf32x3"
        shares = (heads // tensor.shape[2] for tensor in (self.x, self.b, self.c))
        options = dict(zip(("X_SHARE", "B_SHARE", "C_SHARE"), shares, strict=True), H=heads, P=head, N=state)
        # For Ampere the compiler else gives up on registers: 32 a thread and all else in memory (Triton 3.6).
        limit = dict(maxnreg=255) if 0 < nvidia_generation(self.x.device) < 9 else {}
        return options | dict(PACKED=self.documents is not None, TYPE=element, PRECISION=precision) | limit

    @property
    def strides(self) -> tuple[int, ...]:
        """From row to row and from head to head of x, b and c."""
        return tuple(stride for tensor in (self.x, self.b, self.c) for stride in tensor.stride()[:3:2])

    @property
    def token_strides(self) -> tuple[int, ...]:
        """From token to token; kernels are compiled for them, so that a tile's rows have one address."""
        return self.x.stride(1), self.b.stride(1), self.c.stride(1)

    def copied(self, tile: Tile, *tensors: Tensor) -> bool:
        """Whether the copy engine may carry the tile's chunks of these tensors [B, T, heads, width]."""
        return tile.tma and self.sizes[1] % tile.chunk == 0 and all(map(self._describable, tensors))

    def _describable(self, tensor: Tensor) -> bool:
        """Whether all tokens of all rows are one matrix, of the operands' type, that the copy engine can address."""
        rows, tokens, heads, width = tensor.shape
        row, token, head, _ = tensor.stride()
        whole = (rows == 1 or row == tokens * token) and token >= (heads - 1) * head + width
        aligned = tensor.data_ptr() % 16 == 0 and token * tensor.element_size() % 16 == 0
        return whole and aligned and rows * tokens < 2**31 and tensor.dtype == self.operands and has_copy_engine(tensor)

    def states(self, *lead: int) -> Tensor:
        """An fp32 buffer of states [B, H, lead, P, N]."""
        rows, _, heads, head, state = self.sizes
        return torch.empty(rows, heads, *lead, head, state, dtype=torch.float32, device=self.x.device)


def scan_forward(scan: Scan, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [B, T, H, P], the last state [B, H, P, N], and the states [B, H, segments, P, N] before segments.

    The third is the initial state where a row is one segment.
    """
    rows, tokens, heads, head, _ = scan.sizes
    tile = scan.plan.forward
    y = torch.empty(rows, tokens, heads, head, dtype=scan.x.dtype, device=scan.x.device)
    last, first = scan.states(), None if initial_state is None else initial_state.contiguous()
    decays = sum_decays(scan, tile.chunk)
    if scan.segments > 1:
        first = _join_segments(scan, tile.chunk, decays, None, first)
    tma, tma_out = scan.copied(tile, scan.x, scan.b, scan.c), tile.tma_out and scan.copied(tile, y)
    chunk_scan_kernel[(rows * heads * (head // tile.width), scan.segments)](
        boxed(tma, scan.x, tile.chunk, tile.width), *(boxed(tma, tensor, tile.chunk) for tensor in (scan.b, scan.c)),
        scan.a if scan.d is None else scan.d, *decays, last if first is None else first,
        boxed(tma_out, y, tile.chunk, tile.width), last, *scan.strides, tokens, *scan.lengths(tile.chunk),
        *scan.token_strides, L=tile.chunk, BLOCK_P=tile.width, FIRST=first is not None, HAS_D=scan.d is not None,
        TMA=tma, TMA_OUT=tma_out, **scan.options, num_warps=tile.warps, num_stages=tile.in_flight(tma),
    )  # fmt: skip
    return y, last, first


def scan_backward(
    scan: Scan, first: Tensor | None, grad_y: Tensor, grad_last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, dt, a, b, c, d and the initial state, fp32 for a, d and the state, from those of y and the last.

    `first` as `scan_forward` returned it. The states between chunks are computed anew, and their memory is free after
    this: kept from the forward pass it would be there for every layer at once.
    """
    rows, tokens, heads, head, state = scan.sizes
    tile, device = scan.plan.backward, scan.x.device
    grad_y = unit_stride(grad_y)
    grad_last = None if grad_last is None else grad_last.contiguous()
    decays = sum_decays(scan, tile.chunk)
    if scan.segments > 1:
        grad_last = _join_segments(scan, tile.chunk, decays, grad_y, grad_last)
    first, after, grad_first = chunk_states(scan, decays, first, grad_y, grad_last)
    grad_x, grad_b, grad_c = (_gradient(scan, tensor) for tensor in (scan.x, scan.b, scan.c))
    grad_dt = torch.empty(rows, tokens, heads, dtype=scan.dt.dtype, device=device)
    parts = scan.runs
    grad_a, grad_d = grads = torch.empty(2, rows, heads, parts, dtype=torch.float32, device=device)
    tma = scan.copied(tile, scan.x, scan.b, scan.c, grad_y)
    tma_out = tile.tma_out and scan.copied(tile, grad_x, grad_b, grad_c)
    chunk_grad_kernel[(rows * heads, parts)](
        *(boxed(tma, tensor, tile.chunk) for tensor in (scan.x, scan.b, scan.c, grad_y)),
        scan.a, scan.a if scan.d is None else scan.d, *decays, grad_first if first is None else first,
        boxed(tma, after.view(1, -1, 1, state), head), boxed(tma_out, grad_x, tile.chunk), grad_dt,
        *(boxed(tma_out, grad, tile.chunk) for grad in (grad_b, grad_c)), grad_a, grad_d,
        *scan.strides, *grad_y.stride()[:3:2], tokens, *scan.lengths(tile.chunk)[:1], scan.run // tile.chunk, parts,
        *scan.token_strides, grad_y.stride(1), L=tile.chunk, FIRST=first is not None, HAS_D=scan.d is not None,
        TMA=tma, TMA_OUT=tma_out, **scan.options, num_warps=tile.warps, num_stages=tile.in_flight(tma),
    )  # fmt: skip
    shared = (_sum_heads(grad, like) for grad, like in ((grad_x, scan.x), (grad_b, scan.b), (grad_c, scan.c)))
    grad_x, grad_b, grad_c = shared
    of_a, of_d = grads.sum((1, 3))
    return grad_x, grad_dt, of_a, grad_b, grad_c, None if scan.d is None else of_d, grad_first


def sum_decays(scan: Scan, chunk: int) -> tuple[Tensor, ...]:
    """dt, high, low and leave in one, and resets, of every chunk, as `sum_decays_kernel` describes them."""
    rows, tokens, heads, _, _ = scan.sizes
    chunks = cdiv(tokens, chunk)
    each = torch.empty(rows, heads, chunks, 4, chunk, dtype=torch.float32, device=scan.x.device)
    # Where nothing is packed no resets are read, and any pointer does.
    resets = each if scan.documents is None else each.new_empty(rows, chunks * chunk, dtype=torch.int32)
    block = min(DECAY_HEADS, next_power_of_2(heads))
    sum_decays_kernel[(rows * chunks, cdiv(heads, block))](
        scan.dt, scan.a, scan.a if scan.documents is None else scan.documents, each, resets,
        *scan.dt.stride(), tokens, chunks,
        H=heads, L=chunk, BLOCK_H=block, PACKED=scan.documents is not None, num_warps=4,
    )  # fmt: skip
    return each, resets


def chunk_states(
    scan: Scan, decays: tuple[Tensor, ...], first: Tensor | None, grad_y: Tensor, grad_last: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """States before runs, fp32, gradients after each chunk in the type of products, and those of states before rows.

    [B, H, runs, P, N] (`first`, where runs are segments), [B, H, chunks, P, N], [B, H, P, N].
    """
    rows, _, heads, head, state = scan.sizes
    chunk = scan.plan.backward.chunk
    chunks, length, segments = scan.lengths(chunk)
    after = torch.empty(rows, heads, chunks, head, state, dtype=scan.operands, device=scan.x.device)
    before, grad_first = None if scan.runs == segments else scan.states(scan.runs), scan.states()
    _launch_chain(scan, chunk, decays, grad_y, first, grad_last, before, after, grad_first)
    return first if before is None else before, after, grad_first


@on_own_device
def step_in_place(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """The Triton code behind `ssd_step`; checks done, the state's last dimension dense."""
    rows, heads, head, width = state.shape
    y = torch.empty(rows, heads, head, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x, b, c = (unit_stride(tensor) for tensor in (x, b, c))
    lanes = next_power_of_2(width)
    block = max(1, min(next_power_of_2(head), STEP_ELEMENTS // lanes))
    strides = (stride for tensor in (x, dt, b, c) for stride in tensor.stride()[:2])
    step_kernel[(rows * heads, cdiv(head, block))](
        x, dt, a.contiguous(), b, c, a if d is None else d.contiguous(),
        a if dt_bias is None else dt_bias.contiguous(), state, y, *strides, *state.stride()[:3],
        H=heads, X_SHARE=heads // x.shape[1], B_SHARE=heads // b.shape[1], C_SHARE=heads // c.shape[1],
        P=head, N=width, BLOCK_P=block, BLOCK_N=lanes, HAS_D=d is not None, BIAS=dt_bias is not None,
        SOFTPLUS=dt_softplus, num_warps=2,
    )  # fmt: skip
    return y


def _launch_chain(
    scan: Scan,
    chunk: int,
    decays: tuple[Tensor, ...],
    grad_y: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    end: Tensor,
    decay: Tensor | None = None,
) -> None:
    """`chain_states_kernel`: states into `before` and gradients into `after`, those of the two that are given.

    With `decay` segments by themselves, into `end`: of gradients where `grad_y` is given, else of states.
    """
    rows, tokens, heads, head, _ = scan.sizes
    tile, local = scan.plan.states, decay is not None
    forward, backward = (grad_y is None if local else before is not None), grad_y is not None
    # What is not there is not read, and any tensor does.
    some_y = scan.x if grad_y is None else grad_y
    states = (end if tensor is None else tensor for tensor in (first, last, before, after, end, decay))
    chain_states_kernel[(rows * heads * (head // tile.width), scan.segments, forward + backward)](
        scan.x, scan.b, scan.c, some_y, *decays, *states, *scan.strides, *some_y.stride()[:3:2],
        tokens, *scan.lengths(chunk), scan.run // chunk, *scan.token_strides, some_y.stride(1),
        L=chunk, BLOCK_P=tile.width, FORWARD=forward, BACKWARD=backward,
        FIRST=first is not None, LAST=last is not None, LOCAL=local,
        **scan.options, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _join_segments(
    scan: Scan, chunk: int, decays: tuple[Tensor, ...], grad_y: Tensor | None, given: Tensor | None
) -> Tensor:
    """States before the segments (gradients after them, where `grad_y` is given) [B, H, segments, P, N]."""
    rows, _, heads, head, state = scan.sizes
    local = scan.states(scan.segments)
    decay = local.new_empty(rows, heads, scan.segments)
    _launch_chain(scan, chunk, decays, grad_y, None, None, None, None, local, decay)
    out, size = torch.empty_like(local), head * state
    pass_states_kernel[(rows * heads, cdiv(size, PASS_BLOCK))](
        local, decay, local if given is None else given, out, size, scan.segments,
        REVERSE=grad_y is not None, GIVEN=given is not None, BLOCK=PASS_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


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


def has_copy_engine(tensor: Tensor) -> bool:
    """Hopper and later; the interpreter on a CPU has one too."""
    return not tensor.is_cuda or nvidia_generation(tensor.device) >= 9


def is_hopper(tensor: Tensor) -> bool:
    """Whether launch shapes are those timed on an H200; the interpreter takes them too."""
    return not tensor.is_cuda or nvidia_generation(tensor.device) == 9


def boxed(tma: bool, tensor: Tensor, chunk: int, width: int | None = None) -> Tensor | TensorDescriptor:
    """If `tma`, the copy engine's view of [B, T, heads, W]: a matrix of all tokens, in boxes [chunk, width]."""
    if not tma:
        return tensor
    rows, tokens, heads, last = tensor.shape
    columns = (heads - 1) * tensor.stride(2) + last
    return TensorDescriptor(tensor, [rows * tokens, columns], [tensor.stride(1), 1], [chunk, width or last])


def product_type(x: Tensor, b: Tensor, c: Tensor) -> torch.dtype:
    """bf16 where x, b and c are, or under bf16 autocast on CUDA, as of any product; else fp32."""
    autocast = x.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
    return torch.bfloat16 if autocast or x.dtype == b.dtype == c.dtype == torch.bfloat16 else torch.float32
