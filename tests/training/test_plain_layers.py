"""Layers run as their class says where shapes change at every call."""

from __future__ import annotations

import torch
from training_world import make_model

from posttrain.training import speed


def test_nothing_compiled_runs_inside_and_all_of_it_after() -> None:
    model, compiled = make_model(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    ids = torch.arange(8).view(2, 4)
    with speed.fast_layers(model, compiled=True, backend=backend):
        with speed.plain_layers(model):
            model(ids)
            assert not compiled
            assert not any("forward" in layer.__dict__ for layer in speed.decoder_layers(model))
        model(ids)
        assert compiled
    assert not any("forward" in layer.__dict__ for layer in speed.decoder_layers(model))
