"""What `bench_rollout.py` looks at besides the whole: a step by part, its error, its physical limit, its kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.ceilings import Ceilings
from benchmarks.timing import captured
from posttrain.generation import DecodeEngine, Sampling


def step_parts(
    engine: DecodeEngine, rows: int, sampling: Sampling, device: torch.device, calls: int = 20
) -> dict[str, float]:
    """ms of one step: all of it, the model alone, and the rest (the draw and its bookkeeping), half-way through."""
    state, part = engine.state, slice(0, rows)
    state.slot.sub_(sampling.max_new_tokens // 2)
    state.step.sub_(sampling.max_new_tokens // 2)
    saved = state.snapshot()

    def whole() -> None:
        engine._step(rows, sampling)
        state.restore(saved)

    def restore() -> None:
        state.restore(saved)

    def model() -> None:
        engine.decoder.step(state.token[part], state.slot, state.start[part])

    with torch.no_grad():
        with_restore, alone, restoring = (time_of(call, device, calls) for call in (whole, model, restore))
    step = with_restore - restoring
    return {"step": step, "model": alone, "sampling": step - alone}


def time_of(call: Callable[[], None], device: torch.device, calls: int) -> float:
    """ms of a call; on a GPU captured, as the engine runs it."""
    if device.type == "cuda":
        call = captured(call)
    call()
    times = []
    for _ in range(3):
        started = now(device)
        for _ in range(calls):
            call()
        times.append((now(device) - started) / calls)
    return 1000 * statistics.median(times)


@torch.inference_mode()
def logprob_errors(model: PreTrainedModel, rows: list[list[int]], answers: Any) -> tuple[float, float]:
    """Root mean square errors against an fp32 forward: our log-probabilities, and a forward in the model's type."""
    ours, eager, exact = [], [], []
    reference = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).to(model.device).eval()
    reference.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    for row, tokens, logprobs in zip(rows, answers.tokens, answers.logprobs, strict=False):
        ids = torch.tensor([row + tokens], device=model.device)
        for which, into in ((model, eager), (reference, exact)):
            logits = which(ids).logits[0, len(row) - 1 : -1].float()
            into.append(logits.log_softmax(-1).gather(-1, ids[0, len(row) :, None])[:, 0].cpu())
        ours.append(torch.tensor(logprobs))
    truth = torch.cat(exact)
    return tuple((torch.cat(part) - truth).square().mean().sqrt().item() for part in (ours, eager))


def profile(engine: DecodeEngine, rows: int, sampling: Sampling, steps: int = 8) -> None:
    """Device time of the kernels of a few uncaptured steps, largest first."""
    saved = engine.state.snapshot()
    with torch.no_grad(), torch.profiler.profile() as profiler:
        for _ in range(steps):
            engine._step(rows, sampling)
            engine.state.restore(saved)
    sort = "self_cuda_time_total" if engine.device.type == "cuda" else "self_cpu_time_total"
    print(f"{steps} steps:\n{profiler.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=70)}")


def limit_ms(model: PreTrainedModel, rows: list[list[int]], new_tokens: int, ceilings: Ceilings) -> float:
    """The least a token can take: weights and the cache of half the answers read once at the measured bandwidth."""
    from posttrain.models.architecture import cache_bytes_per_token, normalise

    size = model.dtype.itemsize
    weights = sum(parameter.numel() for parameter in model.parameters()) * size
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel() * size
    cached = sum(len(row) + new_tokens / 2 for row in rows)
    return ceilings.bytes_ms(weights + cached * cache_bytes_per_token(normalise(model.config.to_dict()), size))


def now(device: torch.device) -> float:
    """Seconds on the clock once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
