"""What the rows of a wave have written so far, in static device tensors that a captured step updates itself.

Legend: R rows of the largest batch, N most new tokens. A *place* is a sequence's number in its wave, 0 … R-1; it never
changes. A *row* is where the sequence is decoded at the moment; compaction moves places to other rows.
"""

from __future__ import annotations

import torch


class WaveState:
    """Rows and places of one wave.

    Attributes:
        token, start, place: by row, int64 [R]: last token, first slot, place of the row.
        slot, step: int64 [1]: where the next token is written, and the number of the next draw.
        finished (bool), count (int64): by place [R]: whether a stop token came, and how many tokens there are.
        tokens (int64), logprobs (fp32), uniforms (fp64): by place [R, N].
        stops: [V] bool, true for tokens that end a row.
    """

    def __init__(self, rows: int, new_tokens: int, vocabulary: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.token, self.start, self.place = zeros(rows), zeros(rows), zeros(rows)
        self.slot, self.step = zeros(1), zeros(1)
        self.finished, self.count = zeros(rows, dtype=torch.bool), zeros(rows)
        self.tokens, self.logprobs = zeros(rows, new_tokens), zeros(rows, new_tokens, dtype=torch.float32)
        self.uniforms = zeros(rows, new_tokens, dtype=torch.float64)
        self.stops = zeros(vocabulary, dtype=torch.bool)

    def begin(self, start: torch.Tensor, slot: int, sequences: int, stop: tuple[int, ...]) -> None:
        """A new wave of `sequences` sequences in as many rows; the rows behind them are finished from the start."""
        device = self.token.device
        self.start.fill_(slot)
        self.start[:sequences] = start
        self.place.copy_(torch.arange(len(self.place), device=device))
        self.slot.fill_(slot)
        self.step.zero_()
        self.count.zero_()
        self.token.zero_()
        self.finished.fill_(True)
        self.finished[:sequences] = False
        self.stops.zero_()
        if stop:
            self.stops[torch.tensor(stop, device=device)] = True

    def draws(self, rows: slice) -> torch.Tensor:
        """The random number of each row's next token, fp64 [b]."""
        place = self.place[rows]
        return self.uniforms[place, self.step.expand(len(place))]

    def record(self, rows: slice, token: torch.Tensor, logprob: torch.Tensor) -> None:
        """Take a token and its log-probability for each of these rows; finished sequences stay as they are."""
        place = self.place[rows]
        step, was_finished = self.step.expand(len(place)), self.finished[place]
        self.tokens.index_put_((place, step), token)
        self.logprobs.index_put_((place, step), logprob)
        self.count.index_add_(0, place, (~was_finished).long())
        self.finished.index_copy_(0, place, was_finished | self.stops[token])
        self.token[rows] = token

    def keep_rows(self, order: torch.Tensor) -> None:
        """Row `order[i]` becomes row i."""
        for tensor in (self.token, self.start, self.place):
            tensor[: len(order)] = tensor.index_select(0, order)

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of what a step changes and a rehearsal must give back."""
        return [tensor.clone() for tensor in self._changing()]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        for tensor, saved in zip(self._changing(), snapshot, strict=True):
            tensor.copy_(saved)

    def _changing(self) -> tuple[torch.Tensor, ...]:
        return (self.token, self.slot, self.step, self.finished, self.count)
