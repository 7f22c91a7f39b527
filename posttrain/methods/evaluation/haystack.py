"""Prompts that hide one sentence in long text: a needle in a haystack (Kamradt 2023; RULER, arXiv:2404.06654).

    head      instruction                   (a chat model's: in the user's turn, from the template's beginning on)
    haystack  text of the data set, cut, with the needle's line "The special magic number of Cairo is 4918273."
    tail      question, and the beginning of the answer: "The special magic number of Cairo is"

Head, needle and tail are tokenised apart from the text, so that a prompt has exactly as many tokens as asked for. The
answer is begun for the model: what is measured is whether it finds the key, not how it words an answer.
"""

from __future__ import annotations

import random
import re
import string
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.builders.batches import batch_seed
from posttrain.data.chat import TEMPLATE_DATE, continued_text
from posttrain.data.spans import check_tokenizer
from posttrain.errors import fail
from posttrain.methods.evaluation.config import NeedleSettings

CITIES = (
    "Accra", "Athens", "Bogota", "Cairo", "Dakar", "Delhi", "Dublin", "Hanoi", "Havana", "Jakarta", "Kyoto", "Lima",
    "Lisbon", "London", "Madrid", "Manila", "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Rome", "Seoul", "Vienna",
)  # fmt: skip
ADJECTIVES = (
    "amber", "ancient", "bitter", "brave", "broken", "calm", "clever", "crimson", "dusty", "eager", "fierce", "frozen",
    "gentle", "golden", "hidden", "hollow", "humble", "jolly", "lonely", "lucky", "mighty", "noisy", "pale", "proud",
    "quiet", "rapid", "rusty", "silver", "sleepy", "stormy", "tiny", "velvet",
)  # fmt: skip
NOUNS = (
    "anchor", "badger", "beacon", "bridge", "candle", "canyon", "castle", "cobra", "comet", "falcon", "feather",
    "garden", "hammer", "harbor", "island", "jacket", "kettle", "ladder", "lantern", "meadow", "mirror", "orchard",
    "otter", "pepper", "pillow", "rocket", "saddle", "spider", "temple", "tunnel", "violin", "walnut",
)  # fmt: skip

KEYS: dict[str, Callable[[random.Random], str]] = {
    "number": lambda draw: str(draw.randrange(10**6, 10**7)),
    "phrase": lambda draw: f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}",
    "code": lambda draw: "".join(draw.choices(string.ascii_uppercase + string.digits, k=8)),
}
"""How a key of each form is drawn."""

_MARK = "\x1fHAYSTACK\x1f"
_SEPARATOR = "\n\n"
_BORDER = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Needle:
    """What is hidden and asked for; `candidates` hold the key and its distractors, in an order that tells nothing."""

    form: str
    city: str
    key: str
    candidates: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The sentence up to the key."""
        return f"The special magic {self.form} of {self.city} is"

    @property
    def sentence(self) -> str:
        return f"{self.answer} {self.key}."


@dataclass(frozen=True)
class Prompt:
    """A prompt of a length and depth.

    Attributes:
        length: of `ids` and the room for the answer together.
        depth: asked for, as a share of the text; `at` is where the sentence came to stand.
        keys: tokens of each of the needle's candidates, as they would follow `ids`.
    """

    length: int
    depth: float
    sample: int
    needle: Needle
    at: float
    ids: list[int]
    keys: list[list[int]]


def draw_needle(cfg: NeedleSettings, depth: int, sample: int) -> tuple[Needle, random.Random]:
    """The needle of a depth's number and a sample's, the same one at all lengths; and the generator to draw on from."""
    draw = random.Random(batch_seed("evaluate.needle", cfg.seed, depth, sample))
    city, keys = draw.choice(CITIES), []
    while len(keys) < cfg.candidates:
        if (key := KEYS[cfg.key](draw)) not in keys:
            keys.append(key)
    return Needle(cfg.key, city, draw.choice(keys), tuple(keys)), draw


def contains_key(text: str, key: str) -> bool:
    """Whether an answer gives the key, not as a part of a longer number or word."""
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text) is not None


class Haystack:
    """The documents of a data set as one text, tokenised when they are needed."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> None:
        check_tokenizer(tokenizer)
        self.texts = [text for row in rows if (text := row["text"].strip())]
        self.tokenizer = tokenizer
        self.separator = encode(tokenizer, _SEPARATOR)
        self._encoded: dict[int, tuple[list[int], list[int]]] = {}

    def cut(self, first: int, tokens: int) -> tuple[list[int], list[int]]:
        """`tokens` tokens from document `first` on, each document once; and where among them a sentence or line may
        stand.

        Raises:
            StageError: there is less text than that.
        """
        ids: list[int] = []
        borders = [0]
        for number in range(len(self.texts)):
            own, inner = self._document((first + number) % len(self.texts))
            if ids:
                ids += self.separator
                borders.append(len(ids))
            borders += [len(ids) + place for place in inner]
            ids += own
            if len(ids) >= tokens:
                return ids[:tokens], [*(place for place in dict.fromkeys(borders) if place < tokens), tokens]
        fail(
            f"the data has {len(ids)} tokens of text; {tokens} are needed beside the question",
            where="needle.lengths",
            fix="inputs.data: a data set with more text (the needle takes all its rows), or shorter needle.lengths",
        )

    def _document(self, number: int) -> tuple[list[int], list[int]]:
        """Tokens, and the places of those that begin a sentence or a line behind the first."""
        if number not in self._encoded:
            text = self.texts[number]
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            starts = [start for start, _ in encoded["offset_mapping"]]
            places = [(bisect_left(starts, gap.start()), gap.end()) for gap in _BORDER.finditer(text)]
            # A token may reach from one sentence into the next: that border is none.
            borders = [place for place, end in places if place < len(starts) and starts[place] <= end]
            self._encoded[number] = list(encoded["input_ids"]), borders
        return self._encoded[number]


def make_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: Any, cfg: NeedleSettings) -> list[Prompt]:
    """All prompts, by length, depth and sample.

    Raises:
        StageError: too little text, a length without room for the question, or a key that is longer than an answer.
    """
    haystack = Haystack(rows, tokenizer)
    prompts = []
    for length in cfg.lengths:
        for number, depth in enumerate(cfg.places()):
            for sample in range(cfg.samples):
                needle, draw = draw_needle(cfg, number, sample)
                first = draw.randrange(max(1, len(haystack.texts)))
                prompts.append(_prompt(haystack, needle, first, length, depth, sample, cfg.max_new_tokens))
    return prompts


def _prompt(
    haystack: Haystack, needle: Needle, first: int, length: int, depth: float, sample: int, room: int
) -> Prompt:
    tokenizer = haystack.tokenizer
    before, after, special = frame(needle, tokenizer)
    head, tail = encode(tokenizer, before, special), encode(tokenizer, after)
    line = encode(tokenizer, f"\n{needle.sentence}\n")
    keys = [continuation(tokenizer, after, tail, f" {key}") for key in needle.candidates]
    if (longest := max(map(len, keys))) > room:
        fail(
            f"a key is up to {longest} tokens long, an answer at most {room}",
            where="needle.max_new_tokens",
            fix=f"needle.max_new_tokens={longest + 8}, or another needle.key",
        )
    tokens = length - room - len(head) - len(tail) - len(line)
    if tokens < 1:
        fail(
            f"a length of {length} tokens has no text: question and answer take {length - tokens}",
            where="needle.lengths",
            fix=f"needle.lengths=[{2 * (length - tokens)}], or longer ones",
        )
    text, borders = haystack.cut(first, tokens)
    at = min(borders, key=lambda place: abs(place - depth * tokens))
    ids = [*head, *text[:at], *line, *text[at:], *tail]
    assert len(ids) + room == length
    return Prompt(length, depth, sample, needle, at / tokens, ids, keys)


def frame(needle: Needle, tokenizer: Any) -> tuple[str, str, bool]:
    """What stands before and after the text, and whether special tokens are to be added before it.

    A model with a chat template meets it as a user's turn and the beginning of the assistant's, another one as plain
    text.
    """
    content = (
        f"A special magic {needle.form} is hidden in the following text. Remember it: you will be asked for it.\n\n"
        f"{_MARK}\n\nWhat is the special magic {needle.form} of {needle.city} that the text mentions?"
    )
    chat = bool(getattr(tokenizer, "chat_template", None))
    prompt = [{"role": "user", "content": content}] if chat else content + "\n"
    text, special = continued_text(prompt, tokenizer, date_string=TEMPLATE_DATE)
    before, mark, after = text.partition(_MARK)
    if not mark or _MARK in after:
        fail(
            "the chat template does not give a user's text as it is",
            where="needle",
            fix="needle=null, or a model with another chat template",
        )
    return before, after + needle.answer, special


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def continuation(tokenizer: Any, text: str, ids: list[int], more: str) -> list[int]:
    """Tokens of `more` behind `text`, whose tokens are `ids`: as of both in one, if that begins with `ids`."""
    whole = encode(tokenizer, text + more)
    return whole[len(ids) :] if whole[: len(ids)] == ids else encode(tokenizer, more)
