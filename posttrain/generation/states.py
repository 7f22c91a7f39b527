"""State-space layers of the decoder: prompts by the chunked scan, steps on a state that is updated in place.

Legend: B rows, T tokens, H query heads, G shared heads, d head width, K taps; C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from posttrain_kernels.mamba_step import conv_step, gated_norm
from posttrain_kernels.rms_norm import rms_norm
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
        gated = gated_norm(y.flatten(0, 1).flatten(1), z.flatten(0, 1), self.w.get("norm"), self.eps, self.width)
        return self._project(gated.unflatten(0, z.shape[:2]), "out")

    def step(self, x: torch.Tensor, now: Moment, cache: StateCache) -> torch.Tensor:
        z, drive, dt = self._parts(x)
        heads = (self.heads if self.repeats_first else self.shared,) * 2 + (self.heads,)
        mixed = conv_step(
            drive,
            cache.columns,
            self.w["taps"][:, 0],
            self.w["taps_bias"],
            heads,
            repeats=self.heads // self.shared if self.repeats_first else 1,
            silu=self.activates,
            b_norm=self.w.get("b_norm"),
            c_norm=self.w.get("c_norm"),
            eps=self.eps,
        )
        inputs, keys, queries = mixed.split(heads, dim=1)
        y = ssd_step(
            inputs,
            dt,
            self.w["a"],
            keys,
            queries,
            cache.states[: x.shape[0]],
            self.w["skip"],
            dt_bias=self.w["step_bias"],
            dt_softplus=True,
        )
        return self._project(gated_norm(y.flatten(1), z, self.w.get("norm"), self.eps, self.width), "out")

    def _parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [..., H d], what goes through the convolution, step sizes before bias and softplus [..., H]."""
        rows = (self.inner, self.inner + 2 * self.narrow, self.heads)
        z, drive, dt = self._project(x, "in").split(rows, dim=-1)
        return z, drive, dt

    def _drive(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [..., H d], what goes through the convolution [..., C], step sizes [..., H] in fp32 or wider."""
        z, drive, dt = self._parts(x)
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
                parts[place] = rms_norm(parts[place], weight, self.eps)[0]
        return tuple(parts)
