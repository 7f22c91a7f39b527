"""Inputs and expectations that the tests of linear_kl share, plain and interpreted."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import randn
from posttrain_kernels.linear_kl import linear_kl_reference
from torch import Tensor


def inputs(n: int, v: int, d_s: int, d_t: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """(student_h, student_w, teacher_h, teacher_w) whose logits have a standard deviation near 2."""
    scale = 2.0**0.5
    shapes = (((n, d_s), 1.0), ((v, d_s), d_s**-0.5), ((n, d_t), 1.0), ((v, d_t), d_t**-0.5))
    return [randn(*shape, seed=4 * seed + i, scale=scale * s, dtype=dtype) for i, (shape, s) in enumerate(shapes)]


def row_options(n: int, v: int, seed: int = 0, *, masked: bool = False, labelled: bool = False) -> dict[str, Tensor]:
    """Random weights, a mask that leaves out the first row and others, labels of which some are absent."""
    generator = torch.Generator().manual_seed(seed)
    options = {"weights": torch.rand(n, generator=generator) + 0.1}
    if masked:
        options["mask"] = torch.rand(n, generator=generator) > 0.4
        options["mask"][0] = False
    if labelled:
        labels = torch.randint(0, v, (n,), generator=generator)
        options["labels"] = labels.masked_fill(torch.rand(n, generator=generator) < 0.3, -100)
        options["labels"][-1] = v - 1
        options["label_weights"] = torch.rand(n, generator=generator) - 0.3
    return options


def expected(tensors: list[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(loss, divergence, cross-entropy, gradient of student_h, of student_w) of the reference in fp64."""
    student_h, student_w, *teacher = (tensor.detach().double() for tensor in tensors)
    student_h.requires_grad_(), student_w.requires_grad_()
    wide = {k: o.double() if isinstance(o, Tensor) and o.is_floating_point() else o for k, o in options.items()}
    loss, values, ce = linear_kl_reference(student_h, student_w, *teacher, **wide)
    grads = torch.autograd.grad(loss, (student_h, student_w))
    return loss.detach(), values.detach(), None if ce is None else ce.detach(), *grads


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Copies whose student tensors want gradients."""
    return [tensor.clone().requires_grad_(i < 2) for i, tensor in enumerate(tensors)]
