"""Mamba-2 with the head layout of grouped-query attention (Dao and Gu, arXiv 2405.21060; Zebra-Llama, 2505.17272).

Legend: B batch, T tokens, D hidden width, H query heads, G source KV heads, d_h head_dim, K `mamba_conv_kernel`.
Attention's projections have counterparts: C [H heads] reads as queries do, B [G] is written to as keys are, x [G] is
written as values are; both widths of the state are d_h. Heads of one group share B and x, not their decay, so there are
H states [d_h, d_h].

    [z, x, B, C, dt] = W_in u        x, B, C through a causal depthwise convolution over K tokens
    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ,  y_t = h_t C_t + D x_t,  Δ = softplus(dt + dt_bias),  A = -exp(A_log)
    out = W_out norm(y · silu(z))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_upcycled import UpcycledConfig
from .norm_upcycled import UpcycledGatedRMSNorm, UpcycledRMSNorm, at_least_fp32

try:
    from posttrain_kernels.ssd_scan import ssd_scan, ssd_step
except ImportError:  # a saved model away from this package: the same code lies beside it
    from .ssd_upcycled import chunked_scan as ssd_scan
    from .ssd_upcycled import single_step as ssd_step

FP32 = ("A_log", "dt_bias", "D")
"""Parameters that stay fp32 in a bf16 model: a decay near one, rounded, is another decay after a hundred tokens."""
STEP_SIZES, DECAYS = (1e-3, 0.1), (1.0, 16.0)
"""Published ranges of the random start: Δ log-uniform, −A uniform."""


class Mamba2(nn.Module):
    """State-space mixer; caches H·d_h² state elements in fp32 and K columns of the convolution, whatever the length."""

    def __init__(self, config: UpcycledConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.inner = self.num_heads * self.head_dim
        self.shared = self.num_key_value_heads * self.head_dim
        rows = 2 * self.inner + 2 * self.shared + self.num_heads
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=config.mamba_bias)
        self.repeats_first = config.mamba_repeat_before_conv
        channels = 3 * self.inner if self.repeats_first else self.inner + 2 * self.shared
        self.conv1d = nn.Conv1d(channels, channels, config.mamba_conv_kernel, groups=channels)
        for name in FP32:
            setattr(self, name, nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32)))
        if config.qk_norm:
            self.b_norm = UpcycledRMSNorm(self.head_dim, config.rms_norm_eps)
            self.c_norm = UpcycledRMSNorm(self.head_dim, config.rms_norm_eps)
        self.norm = UpcycledGatedRMSNorm(self.inner, self.head_dim, config.rms_norm_eps, normalises=config.mamba_norm)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.mamba_out_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: None = None,
        attention_mask: None = None,
        padding_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        documents: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        z, drive, dt = self.in_proj(hidden_states).split(
            (self.inner, self.inner + 2 * self.shared, self.num_heads), dim=-1
        )
        step_sizes = nn.functional.softplus(dt.to(at_least_fp32(dt)) + self.dt_bias)
        if padding_mask is not None:
            # Not the hidden states: a bias of the projection would come through. Zero columns are what the convolution
            # sees before a text; a step of no length neither writes nor forgets. Filled, not multiplied: attention may
            # have left NaN where nothing could be looked at.
            padded = (padding_mask == 0)[..., None]
            drive, step_sizes = drive.masked_fill(padded, 0), step_sizes.masked_fill(padded, 0)
        if self.repeats_first:
            drive = self._repeat(drive)
        state = _past_state(past_key_values, self.layer_idx)
        x, b, c = self._heads(self._convolve(drive, past_key_values, documents))
        y = self._scan(x, step_sizes, b, c, state, past_key_values, documents)
        return self.out_proj(self.norm(y.flatten(2), z))

    def _convolve(
        self, drive: torch.Tensor, past_key_values: Cache | None, documents: torch.Tensor | None
    ) -> torch.Tensor:
        """Causal depthwise convolution of x, B, C [B, T, channels] with what is cached before them, and activation."""
        columns = drive.transpose(1, 2)
        if past_key_values is not None:
            columns = past_key_values.update_conv_state(
                columns, self.layer_idx, conv_kernel_size=self.config.mamba_conv_kernel
            )
        weight, bias = self.conv1d.weight, self.conv1d.bias
        if documents is None:
            padded = nn.functional.pad(columns, (weight.shape[-1] - 1, 0))
            mixed = nn.functional.conv1d(padded, weight, bias, groups=weight.shape[0])[..., -drive.shape[1] :]
        else:
            mixed = _convolve_documents(columns[..., -drive.shape[1] :], weight, bias, documents)
        return (nn.functional.silu(mixed) if self.config.mamba_conv_activation else mixed).transpose(1, 2)

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, B and C, each [B, T, its heads, d_h]."""
        shared = self.inner if self.repeats_first else self.shared
        parts = mixed.split((shared, shared, self.inner), dim=-1)
        x, b, c = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return (x, self.b_norm(b), self.c_norm(c)) if self.config.qk_norm else (x, b, c)

    @torch.compiler.disable  # the compiler would unroll the scan's chunks: minutes for what gains nothing
    def _scan(
        self,
        x: torch.Tensor,
        step_sizes: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        state: torch.Tensor | None,
        past_key_values: Cache | None,
        documents: torch.Tensor | None,
    ) -> torch.Tensor:
        """The recurrence from the cached state on, [B, T, H, d_h]; the state after it is cached."""
        a = -torch.exp(self.A_log)
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            return ssd_step(x[:, 0], step_sizes[:, 0], a, b[:, 0], c[:, 0], state, self.D)[:, None]
        if state is not None and torch.is_grad_enabled():
            state = state.clone()  # the cache overwrites it, and the backward pass needs it
        y, state = ssd_scan(x, step_sizes, a, b, c, self.D, initial_state=state, documents=documents)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        return y

    def _repeat(self, drive: torch.Tensor) -> torch.Tensor:
        """x and B of G heads to H, before the convolution: every head then has taps of its own."""
        x, b, c = drive.split((self.shared, self.shared, self.inner), dim=-1)
        groups = self.num_heads // self.num_key_value_heads
        x, b = (part.unflatten(-1, (-1, self.head_dim)).repeat_interleave(groups, dim=2).flatten(2) for part in (x, b))
        return torch.cat((x, b, c), dim=-1)

    def reset_decays(self) -> None:
        """Random A_log and dt_bias in the published ranges, D one; parameters that were loaded stay."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*DECAYS).log())
        low, high = (torch.tensor(bound).log().item() for bound in STEP_SIZES)
        init.copy_(self.dt_bias, inverse_softplus(torch.empty_like(self.dt_bias).uniform_(low, high).exp()))
        init.ones_(self.D)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Mamba2:
        """Move and cast with the model, but keep `FP32` in fp32 when the model becomes bf16 or fp16."""
        exact = {name: getattr(self, name).detach() for name in FP32}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = value.float().to(parameter.device)
        return self


def inverse_softplus(value: torch.Tensor) -> torch.Tensor:
    """The number whose softplus is `value` > 0."""
    return value + torch.log(-torch.expm1(-value))


def _past_state(past_key_values: Cache | None, layer_idx: int) -> torch.Tensor | None:
    """The state that earlier tokens left, None if there are none."""
    if past_key_values is None:
        return None
    if layer_idx >= len(past_key_values.layers) or not hasattr(past_key_values.layers[layer_idx], "recurrent_states"):
        raise ValueError(
            f"this cache has no state for layer {layer_idx}: make it with DynamicCache(config=model.config)"
        )
    layer = past_key_values.layers[layer_idx]
    return layer.recurrent_states[0] if layer.has_previous_state[0] else None


def _convolve_documents(
    columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, documents: torch.Tensor
) -> torch.Tensor:
    """The convolution of [B, channels, T] tap by tap: a tap that would reach into another document gives nothing."""
    kernel, length = weight.shape[-1], columns.shape[-1]
    mixed = columns * weight[:, 0, -1:] + bias[:, None]
    for back in range(1, min(kernel, length)):
        same = (documents[:, back:] == documents[:, :-back])[:, None]
        earlier = columns[..., :-back] * same * weight[:, 0, kernel - 1 - back, None]
        mixed = mixed + nn.functional.pad(earlier, (back, 0))
    return mixed
