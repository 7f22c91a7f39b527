"""Hybrids in the native layout: caches of states are read, alone and beside keys, and padded batches are compared."""

from __future__ import annotations

import pytest
from methods.export.export_world import export
from models.hybrid_models import make_hybrid

from posttrain.errors import StageError
from posttrain.methods.export import verify
from posttrain.models.architecture import cache_state_bytes, normalise
from posttrain.models.loading import save_model
from posttrain.models.tiny import tiny_tokenizer


@pytest.mark.parametrize("mixers", [("mamba2", "full_attention"), ("mamba2", "mamba2")], ids=["hybrid", "states alone"])
def test_a_hybrid_is_written_natively(tmp_path, mixers) -> None:
    model = make_hybrid(mixers)
    certificate = export(save_model(model, tiny_tokenizer(), tmp_path / "native"), to="native")
    assert [step["name"].partition(",")[0] for step in certificate["steps"]] == [
        "whole export in fp32",
        "decoding with the cache",
        "left-padded batch",
    ]
    assert all(step["exact"] and step["relative"] <= 1e-5 for step in certificate["steps"])
    assert certificate["generation"]["equal"]
    constant = cache_state_bytes(normalise(model.config.to_dict()), 4)
    assert certificate["cache_state_bytes"] == {"predicted": constant, "measured": constant, "model": constant}
    assert certificate["parameters"]["measured"] == sum(parameter.numel() for parameter in model.parameters())


def test_padding_that_is_seen_is_refused(tmp_path, monkeypatch) -> None:
    blind = verify.PROBE.replace("attention_mask=mask,", "attention_mask=torch.ones_like(mask),")
    assert blind != verify.PROBE
    monkeypatch.setattr(verify, "PROBE", blind)
    with pytest.raises(StageError, match="left-padded batch, then decoding, new process: logits are off"):
        export(save_model(make_hybrid(("mamba2",)), tiny_tokenizer(), tmp_path / "native"), to="native")
    assert not list((tmp_path / "export").iterdir())
