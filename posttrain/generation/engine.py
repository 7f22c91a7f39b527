"""`DecodeEngine`: generation for many prompts at once, on static caches and captured steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from posttrain.errors import fail
from posttrain.generation.decoder import Decoder
from posttrain.generation.graphs import Captured
from posttrain.generation.sampling import Sampling, choose, uniforms
from posttrain.generation.state import WaveState
from posttrain.generation.tokens import check_ids
from posttrain.generation.weights import DecoderWeights

STEPS_BETWEEN_LOOKS = 16
"""On a GPU the host looks that seldom at which rows are finished: each look waits for the device."""
PREFILL_TOKENS = {"cuda": 16384, "cpu": 2048}
"""Prompt tokens that go through the model at once; bounds the activations, not the result."""
FIRST_TOKENS = 256
"""Rows whose first tokens are drawn at once: bounds the copies of their logits."""
SMALLEST_BUCKET = {"cuda": 8, "cpu": 1}
"""On a GPU fewer rows than this are no faster, and each batch size costs a capture."""

OnStep = Callable[[dict[int, int]], bool | None]


@dataclass
class Generated:
    """What came out, in the order of the prompts.

    Attributes:
        tokens: the new token ids; the stop token that ended a row is the last of them.
        logprobs: of each token, log softmax(logits / T) of the unfiltered distribution (T = 1 where greedy).
        finished: whether a stop token came.
        steps: decoding steps taken, prefills not counted, over all waves.
        seconds, prefill_seconds: wall time of everything, and of the prompts with their first token.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]
    steps: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0


class DecodeEngine:
    """Decodes with a packed copy of a model's weights; make it once, `load` new weights, `generate` as often as wanted.

    A row's greedy or sampled tokens depend on its prompt, the settings, the seed and its row id, and not on the rows
    beside it, up to the rounding of matrix products of different sizes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int,
        max_tokens: int,
        dtype: torch.dtype | None = None,
        graphs: bool = True,
        share: bool = False,
    ) -> None:
        """Copy the weights and allocate everything that decoding needs, on the model's device.

        Args:
            max_rows: most sequences decoded side by side; more prompts are answered in waves.
            max_tokens: cache slots of a row: prompt and new tokens together.
            dtype: of weights, activations and caches; null is bf16 on a GPU and fp32 on a CPU. fp64 on a CPU only.
            graphs: false runs each step as it is on a GPU too, instead of capturing it in a CUDA graph.
            share: keep the model's own tensors where they fit as they are (about half of the weights): less memory for
                weights that do not change. `load` is then refused.

        Raises:
            StageError: the decoder does not support the model (`posttrain.generation.unsupported` says why).
        """
        device = model.device
        if max_rows < 1 or max_tokens < 2:
            fail(f"a decoder needs a row and two tokens at least, not {max_rows} rows of {max_tokens} tokens")
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if device.type == "cuda" and dtype == torch.float64:
            fail("the decoder's kernels count in fp32: fp64 is for a CPU", fix="dtype=torch.float32")
        self.device, self.max_rows, self.max_tokens = device, max_rows, max_tokens
        self.graphs = device.type == "cuda" and graphs
        self.buckets = _buckets(max_rows, SMALLEST_BUCKET.get(device.type, 1))
        self.look_every = STEPS_BETWEEN_LOOKS if device.type == "cuda" else 1
        self.prefill_tokens = PREFILL_TOKENS.get(device.type, PREFILL_TOKENS["cpu"])
        with self._device(), torch.inference_mode(False), torch.no_grad():
            self.weights = DecoderWeights(model, max_tokens, dtype, share)
            self.decoder = Decoder(self.weights, max_rows, max_tokens)
            self.state = WaveState(max_rows, max_tokens, self.weights.arch["vocab_size"], device)
        self._captured = Captured()
        self._side: torch.cuda.Stream | None = None
        self._pool = None

    def load(self, model: PreTrainedModel) -> None:
        """Take over new weights of the same architecture, in place; captured steps stay valid.

        Raises:
            StageError: another architecture, or the engine shares its weights with a model.
        """
        with self._device(), torch.inference_mode(False):
            self.weights.load(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        row_ids: Sequence[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Generated:
        """Continue every prompt.

        Args:
            prompts: token ids, of any lengths.
            row_ids: what a row's draws depend on besides the seed; null is its number in `prompts`.
            on_step: called after every token with {number of the prompt: its new token} of the unfinished rows; true
                ends the generation. It makes the host wait for every step.

        Raises:
            StageError: a prompt is empty, too long for the cache, or holds an id outside the vocabulary.
        """
        self._check(prompts, sampling, row_ids)
        # Prompts of like length together: little padding, and rows of a wave end their prefill in the same slot.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        result = Generated([[] for _ in prompts], [[] for _ in prompts], [False] * len(prompts))
        started = self._now()
        with self._device(), torch.inference_mode(False), torch.no_grad():
            for first in range(0, len(order), self.max_rows):
                wave = order[first : first + self.max_rows]
                ids = [index if row_ids is None else row_ids[index] for index in wave]
                if self._wave([prompts[index] for index in wave], ids, sampling, wave, on_step, result):
                    break
        result.seconds = self._now() - started
        return result

    def bytes(self) -> int:
        """Bytes of weights and caches."""
        return self.weights.bytes() + self.decoder.cache_bytes()

    def _wave(
        self,
        prompts: list[Sequence[int]],
        row_ids: list[int],
        sampling: Sampling,
        numbers: list[int],
        on_step: OnStep | None,
        result: Generated,
    ) -> bool:
        """Answer one wave; `numbers` are its prompts' places in the result. True: the caller asked to end."""
        state, started = self.state, self._now()
        end = max(map(len, prompts))
        start = torch.tensor([end - len(prompt) for prompt in prompts], device=self.device)
        state.begin(start, end, len(prompts), sampling.stop)
        if not sampling.greedy:
            ids = torch.tensor(row_ids, device=self.device)
            state.uniforms[: len(prompts), : sampling.max_new_tokens] = uniforms(
                sampling.seed, ids, sampling.max_new_tokens
            )
        self._prefill(prompts, start, end, sampling)
        result.prefill_seconds += self._now() - started
        ended = self._decode(len(prompts), sampling, numbers, on_step, result)
        self._collect(numbers, result)
        return ended

    def _prefill(self, prompts: list[Sequence[int]], start: torch.Tensor, end: int, sampling: Sampling) -> None:
        """Prompts, each different one once and in slices, and the first token of every row."""
        source, rows = _distinct(prompts)
        logits = []
        for first, last in _slices([len(prompts[row]) for row in rows], self.prefill_tokens):
            part = [prompts[row] for row in rows[first:last]]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in part], device=self.device)
            padded = min(map(len, part)) < width
            logits.append(self.decoder.prefill(ids, start[rows[first:last]], first, end, padded))
        if len(rows) < len(prompts):
            self.decoder.keep_rows(torch.tensor(source, device=self.device))
        of_prompts = torch.cat(logits)
        for first in range(0, len(prompts), FIRST_TOKENS):
            part = slice(first, min(first + FIRST_TOKENS, len(prompts)))
            self.state.record(part, *choose(of_prompts[source[part]], sampling, self.state.draws(part)))
        self.state.step.add_(1)

    def _decode(
        self, sequences: int, sampling: Sampling, numbers: list[int], on_step: OnStep | None, result: Generated
    ) -> bool:
        """Steps until every sequence is finished or has all its tokens; finished rows are dropped on the way."""
        rows, places = self._fitting(sequences), list(range(self.max_rows))
        look_every = self.look_every if on_step is None else 1
        taken = 1
        before = [False] * sequences + [True] * (self.max_rows - sequences)
        while True:
            finished = self.state.finished.tolist()
            if on_step is not None:
                tokens = self.state.token.tolist()
                new = {numbers[place]: tokens[row] for row, place in enumerate(places[:rows]) if not before[place]}
                if on_step(new):
                    return True
                before = finished
            active = [row for row in range(rows) if not finished[places[row]]]
            if not active or taken >= sampling.max_new_tokens:
                return False
            if self._fitting(len(active)) < rows:
                rows = self._compact(rows, active, places)
            for _ in range(min(look_every, sampling.max_new_tokens - taken)):
                self._advance(rows, sampling)
                taken += 1
                result.steps += 1

    def _compact(self, rows: int, active: list[int], places: list[int]) -> int:
        """Move the unfinished rows together, with finished ones to fill the batch size up; the new number of rows."""
        fitting, waiting = self._fitting(len(active)), set(active)
        order = (active + [row for row in range(rows) if row not in waiting])[:fitting]
        index = torch.tensor(order, device=self.device)
        self.decoder.keep_rows(index)
        self.state.keep_rows(index)
        places[:fitting] = [places[row] for row in order]
        return fitting

    def _advance(self, rows: int, sampling: Sampling) -> None:
        if not self.graphs:
            self._step(rows, sampling)
            return
        self._captured.get(sampling.program(), rows, lambda: self._capture(rows, sampling)).replay()

    def _step(self, rows: int, sampling: Sampling) -> None:
        """One token for the first `rows` rows. Works on static tensors alone and reads none of them on the host."""
        state, part = self.state, slice(0, rows)
        logits = self.decoder.step(state.token[part], state.slot, state.start[part])
        state.record(part, *choose(logits, sampling, state.draws(part)))
        state.slot.add_(1)
        state.step.add_(1)

    def _capture(self, rows: int, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """A graph of `_step`. Rehearsals compile kernels; what they wrote is put back, or replay writes it again."""
        saved, states = self.state.snapshot(), self.decoder.snapshot()
        if self._side is None:
            # One pool for all: graphs run one after the other and leave their results in the static tensors.
            self._side, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(3):
                self._step(rows, sampling)
                self.state.restore(saved)
                self.decoder.restore(states)
        del states
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(rows, sampling)
        return graph

    def _collect(self, numbers: list[int], result: Generated) -> None:
        state, sequences = self.state, len(numbers)
        counts, finished = state.count[:sequences].tolist(), state.finished[:sequences].tolist()
        longest = max(counts)
        tokens, logprobs = state.tokens[:sequences, :longest].tolist(), state.logprobs[:sequences, :longest].tolist()
        for place, number in enumerate(numbers):
            result.tokens[number] = tokens[place][: counts[place]]
            result.logprobs[number] = logprobs[place][: counts[place]]
            result.finished[number] = finished[place]

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling, row_ids: Sequence[int] | None) -> None:
        vocabulary = self.weights.arch["vocab_size"]
        check_ids(prompts, vocabulary)
        for number, prompt in enumerate(prompts):
            if len(prompt) + sampling.max_new_tokens > self.max_tokens:
                fail(
                    f"prompt {number} has {len(prompt)} tokens; with {sampling.max_new_tokens} new ones that exceeds "
                    f"the cache of {self.max_tokens}",
                    fix="shorten it, lower max_new_tokens, or make the DecodeEngine with a larger max_tokens",
                )
        if row_ids is not None and len(row_ids) != len(prompts):
            fail(f"{len(row_ids)} row ids for {len(prompts)} prompts")
        if wrong := [token for token in sampling.stop if not 0 <= token < vocabulary]:
            fail(f"stop token {wrong[0]} is not in the vocabulary of {vocabulary}")

    def _fitting(self, rows: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def _device(self) -> AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _buckets(max_rows: int, smallest: int) -> list[int]:
    """Batch sizes that are captured: powers of two from the smallest, and the largest."""
    sizes = [1 << power for power in range(max_rows.bit_length()) if smallest <= 1 << power < max_rows]
    return [*sizes, max_rows]


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """For each prompt the number of the different prompt that it is, and for each of those its first row."""
    numbers: dict[tuple[int, ...], int] = {}
    source = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    rows = [source.index(number) for number in range(len(numbers))]
    return source, rows


def _slices(lengths: list[int], budget: int) -> list[tuple[int, int]]:
    """Ranges of rows whose padded tokens stay within the budget (one row at least). `lengths` ascend."""
    ranges, first = [], 0
    for row, length in enumerate(lengths):
        if row > first and (row + 1 - first) * length > budget:
            ranges.append((first, row))
            first = row
    return [*ranges, (first, len(lengths))]
