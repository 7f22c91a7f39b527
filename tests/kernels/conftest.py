"""Leaves `interpreted/` out of a plain run: triton reads `TRITON_INTERPRET` once, when it is first imported.

Another test of the same worker may have imported it through trl or transformers by then, so `test_interpreter.py`
runs those files in a process of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty`, `empty_like` and `new_empty` give NaN: what an operator allocates and does not write shows."""

    def poison(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
