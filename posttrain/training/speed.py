"""How a model is made to run fast for a while, and left as it was: compiled layers, recomputed layers, attention.

Everything here acts on instances and is undone at the end of a `with` block; parameters and their names are untouched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

ATTENTION_ORDER = ("cudnn", "flash", "efficient", "math")
"""torch's attention kernels, the fastest first; one that cannot do a shape is passed over."""

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

GRAPHS = 64
"""Variants of a compiled layer that a process may hold (kinds of layer, models, training or not); torch stops at 8."""

CAUSAL = "posttrain_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's blocks in order, whatever the family calls them: the units of compilation and recomputation."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def fast_layers(
    model: nn.Module,
    *,
    compiled: bool,
    lean: bool = False,
    recomputed: int = 0,
    recomputed_mlps: int = 0,
    backend: str | Callable[..., Any] = "inductor",
) -> Iterator[None]:
    """Inside, every decoder layer is compiled, and the first `recomputed` layers keep only their input for backward.

    The first layers, because their turn in the backward pass comes when the later ones' activations are freed: what is
    recomputed then needs no room of its own. One compiled function serves all layers, so that layers of equal structure
    share a graph and compilation takes as long as for one layer of each kind. With `lean`, compiled layers do not keep
    what pointwise operations can make again from what they keep. The first `recomputed_mlps` layers keep nothing of
    their feed-forward part, the widest tensors for the least work.
    """
    layers = decoder_layers(model)
    run = torch.compile(_run_lean if lean else _run, dynamic=False, backend=backend) if compiled else _run
    for index, layer in enumerate(layers):
        # An attribute of the instance hides the class's method; `state_dict` sees modules and tensors only.
        layer.forward = functools.partial(_recompute if index < recomputed else _call, run, layer)
    mlps = [layer.mlp for layer in layers[recomputed:recomputed_mlps]]
    for mlp in mlps:
        mlp.forward = functools.partial(_recompute_mlp, mlp)
    try:
        with compiler_settings(lean) if compiled else contextlib.nullcontext():
            yield
    finally:
        for module in (*layers, *mlps):
            del module.forward


@contextlib.contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Inside, layers run as their class says, within a `fast_layers` too: for calls whose shapes change every time."""
    layers = decoder_layers(model)
    modules = [*layers, *(layer.mlp for layer in layers if hasattr(layer, "mlp"))]
    replaced = [(module, module.__dict__.pop("forward")) for module in modules if "forward" in module.__dict__]
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward


def _run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _run_lean(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The same under another name: compiled code belongs to a function, and what it keeps is decided when compiling."""
    return type(layer).forward(layer, *args, **kwargs)


def _call(run: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return run(layer, *args, **kwargs)


def _recompute(run: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return run(layer, *args, **kwargs)
    # Keeping the random state would wait for the device; without dropout there is none to keep.
    return checkpoint(run, layer, *args, use_reentrant=False, preserve_rng_state=draws_random(layer), **kwargs)


def draws_random(model: nn.Module) -> bool:
    """Whether a training pass through the module draws random numbers: dropout, of a module or of attention."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        if any(getattr(holder, "attention_dropout", 0.0) for holder in (module, getattr(module, "config", None))):
            return True
    return False


def _recompute_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    if not (mlp.training and torch.is_grad_enabled()):
        return type(mlp).forward(mlp, x)
    return checkpoint(type(mlp).forward, mlp, x, use_reentrant=False, preserve_rng_state=draws_random(mlp))


def reads_device(model: PreTrainedModel) -> bool:
    """Whether a forward pass over whole rows waits for the device, in place of which a CUDA graph has nothing.

    Dynamic rotary embeddings compare a length that only the device knows; attention other than torch's own looks for
    packed documents (`causal_without_masks` spares torch's that), and so do layers with a state.
    """
    if "mamba2" in (getattr(model.config, "mixers", None) or ()):
        return True
    rope = getattr(model.config, "rope_parameters", None) or {}
    return rope.get("rope_type") == "dynamic" or model.config._attn_implementation not in ("sdpa", CAUSAL)


@contextlib.contextmanager
def compiler_settings(lean: bool = False) -> Iterator[None]:
    """Inside, a process may hold many compiled layers; with `lean` they keep less for the backward pass."""
    import torch._dynamo
    import torch._functorch.config

    limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    # Any budget below 1 makes the partitioner first recompute all pointwise operations, which is well below 0.99;
    # matrix products are recomputed only for a smaller budget.
    budget = 0.99 if lean else 1.0
    with (
        torch._dynamo.config.patch(recompile_limit=limit),
        torch._functorch.config.patch(activation_memory_budget=budget),
    ):
        yield


def can_compile() -> bool:
    """Whether torch's compiler for GPUs has what it needs here: triton, and a C compiler for its launchers."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and importlib.util.find_spec("triton") is not None


def attention_backends(name: str, device: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, attention on a GPU takes the first of `ATTENTION_ORDER` that can do it (`auto`), or the named kernel.

    A CPU has one good kernel, which torch finds by itself. A named kernel that cannot do a shape is torch's error.
    Compiled layers keep the kernel that was chosen when they were compiled.
    """
    if device != "cuda":
        return contextlib.nullcontext()
    names = ATTENTION_ORDER if name == "auto" else (name,)
    return sdpa_kernel([_BACKENDS[name] for name in names], set_priority=True)


@contextlib.contextmanager
def causal_without_masks(model: PreTrainedModel) -> Iterator[None]:
    """Inside, sdpa attention is causal over whole rows and no mask is looked for or made.

    transformers looks for packed documents at every forward pass and asks the device whether there are any: two waits a
    step with a teacher. Only right when rows hold no padding on the left and attention may cross documents: an
    `attention_mask` that is given is not used. A model that attends in another way (eager) is left alone.
    """
    before = model.config._attn_implementation
    if before == "sdpa":
        model.config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextlib.contextmanager
def bf16_residual_stream(model: PreTrainedModel) -> Iterator[None]:
    """Inside, what the layers add to is bf16: the embeddings are cast, and sums with bf16 products stay so."""
    cast = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.bfloat16())
    try:
        yield
    finally:
        cast.remove()
