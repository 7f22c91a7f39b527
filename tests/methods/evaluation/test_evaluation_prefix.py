"""Going on from a prompt that was read once: caches of every mixer, caches that cannot, greedy answers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from needle_case import POSITIONS, Scripted, copying, prompts
from source_models import make_source

from posttrain.methods.evaluation.needle import answer
from posttrain.methods.evaluation.prefix import Narrow, Prefix, Reread, greedy, logprob, logprobs, prefix_class
from posttrain.models.tiny import tiny_tokenizer


def test_the_end_of_the_answer_is_the_models(tmp_path: Path) -> None:
    prefix = Prefix(Scripted(lambda ids: torch.nn.functional.one_hot(torch.tensor(len(ids)), 300).float()), [1, 2, 3])
    assert greedy(prefix, 9, (6,)) == [3, 4, 5] and greedy(prefix, 2, (6,)) == [3, 4] and greedy(prefix, 9, (3,)) == []


def mixed(*mixers: str):
    """A model of these mixers, what is new in it random."""
    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    source = make_source("llama", num_hidden_layers=len(mixers), max_position_embeddings=POSITIONS)
    latent = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    fields = latent if "latent_attention" in mixers else {}
    model = build_upcycled(source, UpcycledConfig.from_source(source.config, mixers=list(mixers), **fields)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isnan().any():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "mixers",
    [
        ("full_attention", "full_attention"),
        ("mamba2", "full_attention"),
        ("full_attention", "mamba2"),
        ("mamba2", "mamba2"),
        ("latent_attention", "latent_attention"),
        ("mamba2", "latent_attention"),
    ],
)
def test_log_probabilities_behind_a_cache_are_those_of_the_whole_text(mixers: tuple[str, ...], monkeypatch) -> None:
    model = mixed(*mixers).double()
    assert prefix_class("model", model) is Prefix
    one = prompts(lengths=[460])[3]
    prefix = Prefix(model, one.ids)
    reread = Reread(model, one.ids)
    for tokens in [*one.keys, one.keys[0], one.keys[1][:1]]:
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([[*one.ids, *tokens]])).logits[0].double(), -1)
        expected = sum(log_p[len(one.ids) - 1 + place, token].item() for place, token in enumerate(tokens))
        # Log-probabilities are taken in fp32.
        assert logprob(prefix, tokens) == pytest.approx(expected, rel=1e-5)
        assert logprob(reread, tokens) == pytest.approx(expected, rel=1e-5)
    keys = [*one.keys, one.keys[1][:1], one.keys[0][:-1]]
    alone = pytest.approx([logprob(prefix, tokens) for tokens in keys], rel=1e-6)
    assert prefix.places() > len(keys) and logprobs(prefix, keys) == alone == logprobs(reread, keys)
    monkeypatch.setattr(Prefix, "places", lambda self: 3)
    assert logprobs(prefix, keys) == alone
    written, ids = greedy(prefix, 8, ()), list(one.ids)
    for token in written:
        with torch.no_grad():
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)
    assert greedy(prefix, 8, ()) == written == greedy(reread, 8, ())


def test_a_model_whose_cache_takes_single_tokens_only_reads_again(caplog) -> None:
    class Single(Scripted):
        def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
            if past_key_values is not None and input_ids.shape[1] > 1:
                raise ValueError("one token at a time")
            return super().forward(input_ids, past_key_values, use_cache, logits_to_keep)

    class Wrong(Scripted):
        def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
            return super().forward(input_ids, None, use_cache, logits_to_keep)

    class Shared(Scripted):
        """Its cache cannot be copied: what one fork reads, all have read."""

        def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
            class Stuck(list):
                def __deepcopy__(self, memo):
                    return self

            cache = Stuck() if past_key_values is None else past_key_values
            return super().forward(input_ids, cache, use_cache, logits_to_keep)

    def by_all(ids):
        return torch.randn(300, generator=torch.Generator().manual_seed(sum(ids)))

    assert prefix_class("model", Scripted(by_all)) is Narrow and not caplog.records  # its cache is a list
    for kind, says in ((Single, "one token at a time"), (Wrong, "other logits"), (Shared, "other logits")):
        caplog.clear()
        assert prefix_class("model", kind(by_all)) is Reread
        assert says in caplog.text and "slow" in caplog.text
    one = prompts(lengths=[460])[0]
    found = [
        answer(prefix_class("model", kind(copying)), kind(copying), tiny_tokenizer(), one, 12, (257,))
        for kind in (Scripted, Single)
    ]
    assert found[0] == found[1] and found[0]["accuracy"]


def test_a_fork_leaves_the_prefix_as_it_was() -> None:
    model = mixed("mamba2", "full_attention")
    with torch.inference_mode():
        prefix = Prefix(model, [1, 2, 3, 4, 5])
        before = copy.deepcopy(prefix.cache), prefix.last.clone()
        fork = prefix.fork()
        fork.feed([6, 7, 8])
        assert not torch.equal(fork.last, prefix.last) and torch.equal(prefix.last, before[1])
        again = Prefix(model, [1, 2, 3, 4, 5]).feed([6, 7, 8])
        torch.testing.assert_close(prefix.feed([6, 7, 8]), again)
