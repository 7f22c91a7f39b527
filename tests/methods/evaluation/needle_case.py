"""Text, prompts and scripted models for the tests of retrieval from long text."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from posttrain.methods.evaluation.config import NeedleSettings
from posttrain.methods.evaluation.haystack import make_prompts
from posttrain.models.tiny import tiny_tokenizer

SMALL = {"lengths": [460, 700], "depths": 3, "samples": 2, "candidates": 4, "max_new_tokens": 12}
STORY = "It was late. The rain fell on the roofs; nobody came! Who would? A dog barked.\nThen it was quiet again. "
POSITIONS = 1024


def rows(count: int = 6) -> list[dict]:
    return [{"id": str(n), "text": f"Part {n}. " + STORY * (1 + n % 3)} for n in range(count)]


def prompts(tokenizer=None, **changes) -> list:
    return make_prompts(rows(), tokenizer or tiny_tokenizer(), NeedleSettings(**{**SMALL, **changes}))


def text_of(prompt) -> str:
    return tiny_tokenizer().decode(prompt.ids)


def without_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


class Scripted(torch.nn.Module):
    """A model of 300 tokens whose next token is a function of those before it; its cache is their list."""

    def __init__(self, next_token) -> None:
        super().__init__()
        self.next_token, self.embedding = next_token, torch.nn.Embedding(300, 1)
        self.config = SimpleNamespace(vocab_size=300)
        self.generation_config = SimpleNamespace(eos_token_id=257)
        self.tokens_read = 0

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        ids = past_key_values if past_key_values is not None else []
        new = input_ids[0].tolist()
        self.tokens_read += len(new)
        logits = []
        for place in range(len(new)):
            ids.append(new[place])
            # Earlier positions are nobody's concern, and a search in each would take long.
            wanted = not logits_to_keep or place >= len(new) - logits_to_keep
            logits.append(self.next_token(ids) if wanted else torch.zeros(300))
        return SimpleNamespace(logits=torch.stack(logits)[None], past_key_values=ids if use_cache else None)


def copying(ids: list[int]) -> torch.Tensor:
    """An induction head: what came after the last earlier place with the longest context in common."""
    best, token = 0, 0
    for place in range(len(ids) - 1):
        common = 0
        while common <= place and ids[place - common] == ids[-1 - common] and common < 40:
            common += 1
        if common and common >= best:
            best, token = common, ids[place + 1]
    return torch.nn.functional.one_hot(torch.tensor(token), 300) * 20.0


def guessing(ids: list[int]) -> torch.Tensor:
    """A bigram model: it has opinions on digits, whatever the text says."""
    return torch.randn(300, generator=torch.Generator().manual_seed(ids[-1])) * 3
