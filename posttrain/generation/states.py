"""State-space layers of the decoder: prompts by the chunked scan, steps on a state that is updated in place.

Legend: B rows, T tokens, H query heads, G shared heads, d head width, K taps; C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from posttrain_kernels.ssd_scan import ssd_scan, ssd_step
from torch.nn import functional as F

from posttrain.generation.caches import StateCache
from posttrain.generation.layers import Mixer, Moment, Prompt, Tables, Weights


class Mamba2(Mixer):
    """Mamba-2 with shared heads, as `posttrain.models.upcycled.mamba_upcycled`."""

    def __init__(self, arch: Mapping[str, Any], index: int, weights: Weights, tables: Tables | None) -> None:
        super().__init__(arch, index, weights, tables)
        self.width, self.shared = arch["head_dim"], arch["num_key_value_heads"]
        self.inner, self.narrow = self.heads * self.width, self.shared * self.width
        self.kernel, self.activates = arch["mamba_conv_kernel"], arch["mamba_conv_activation"]
        self.repeats_first = arch["mamba_repeat_before_conv"]
        self.channels = 3 * self.inner if self.repeats_first else self.inner + 2 * self.narrow

    def allocate(self, rows: int, slots: int, **where: object) -> StateCache:
        return StateCache(rows, self.heads, self.width, self.channels, self.kernel, **where)

    def prefill(self, x: torch.Tensor, prompt: Prompt, cache: StateCache) -> torch.Tensor:
        z, drive, steps = self._drive(x)
        if prompt.real is not None:
            # A step of no length neither writes nor forgets; zero columns are what stands before a text.
            padded = ~prompt.real[..., None]
            drive, steps = drive.masked_fill(padded, 0), steps.masked_fill(padded, 0)
        columns = F.pad(drive.transpose(1, 2), (self.kernel - 1, 0))  # [b, C, K - 1 + T]
        mixed = F.conv1d(columns, self.w["taps"], self.w["taps_bias"], groups=self.channels).transpose(1, 2)
        inputs, keys, queries = self._heads(mixed)
        y, state = ssd_scan(inputs, steps, self.w["a"], keys, queries, self.w["skip"])
        cache.write(prompt.rows, columns, state)
        return self._project(self._gated(y.flatten(2), z), "out")

    def step(self, x: torch.Tensor, now: Moment, cache: StateCache) -> torch.Tensor:
        z, drive, steps = self._drive(x)
        window = cache.push(drive)  # [B, C, K]
        # Summed in fp32 as a convolution's kernel does.
        wide = torch.promote_types(drive.dtype, torch.float32)
        mixed = (window.to(wide) * self.w["taps"][:, 0]).sum(-1) + self.w["taps_bias"]
        inputs, keys, queries = self._heads(mixed.to(drive.dtype))
        y = ssd_step(inputs, steps, self.w["a"], keys, queries, cache.states[: x.shape[0]], self.w["skip"])
        return self._project(self._gated(y.flatten(1), z), "out")

    def _drive(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [..., H d], what goes through the convolution [..., C], step sizes [..., H] in fp32 or wider."""
        rows = (self.inner, self.inner + 2 * self.narrow, self.heads)
        z, drive, dt = self._project(x, "in").split(rows, dim=-1)
        steps = F.softplus(dt.to(self.w["step_bias"].dtype) + self.w["step_bias"])
        return z, self._repeat(drive) if self.repeats_first else drive, steps

    def _repeat(self, drive: torch.Tensor) -> torch.Tensor:
        groups = self.heads // self.shared
        inputs, keys, queries = drive.split((self.narrow, self.narrow, self.inner), dim=-1)
        inputs, keys = (
            part.unflatten(-1, (-1, self.width)).repeat_interleave(groups, dim=-2).flatten(-2)
            for part in (inputs, keys)
        )
        return torch.cat((inputs, keys, queries), dim=-1)

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, B and C, each [..., its heads, d]."""
        mixed = F.silu(mixed) if self.activates else mixed
        narrow = self.inner if self.repeats_first else self.narrow
        parts = [part.unflatten(-1, (-1, self.width)) for part in mixed.split((narrow, narrow, self.inner), dim=-1)]
        for place, name in ((1, "b_norm"), (2, "c_norm")):
            if (weight := self.w.get(name)) is not None:
                parts[place] = _rms(parts[place], self.eps).to(mixed.dtype) * weight
        return tuple(parts)

    def _gated(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """`norm(y · silu(z))` over each head, or the gate alone; in fp32 or wider."""
        wide = torch.promote_types(z.dtype, torch.float32)
        gated = y.to(wide) * F.silu(z.to(wide))
        if (weight := self.w.get("norm")) is None:
            return gated.to(z.dtype)
        return _rms(gated.unflatten(-1, (self.heads, self.width)), self.eps).flatten(-2).to(z.dtype) * weight


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x over its root mean square along the last dimension, fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
