"""A few kilobytes of made-up sentences, the same on every machine: for runs that must take seconds."""

from __future__ import annotations

import random

from posttrain.data.documents import Document

PEOPLE = ("Ada", "Bruno", "Chen", "Dalia", "Emeka", "Freya", "Goran", "Hana")
THINGS = ("a red kite", "two brass keys", "the old lantern", "some rye bread", "a blue map", "the garden gate")
PLACES = ("by the river", "in the workshop", "under the bridge", "at the harbour", "near the mill", "on the hill")
VERBS = ("found", "lost", "painted", "repaired", "carried", "described")
TIMES = ("In the morning", "At noon", "Before supper", "Last winter", "On Tuesday", "After the rain")
DOCUMENTS, SENTENCES = 48, 8


def build() -> list[Document]:
    """48 documents of eight sentences; each seventh is a conversation."""
    source = random.Random(20_240)
    documents = []
    for number in range(DOCUMENTS):
        sentences = [_sentence(source) for _ in range(SENTENCES)]
        name = f"tiny-{number:02d}"
        if number % 7:
            documents.append(Document(id=name, text=" ".join(sentences)))
        else:
            turns = (("user", "Tell me a short story."), ("assistant", " ".join(sentences[:4])))
            text = "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)
            documents.append(Document(id=name, text=text, messages=turns))
    return documents


def _sentence(source: random.Random) -> str:
    time, person, verb = source.choice(TIMES), source.choice(PEOPLE), source.choice(VERBS)
    return f"{time} {person} {verb} {source.choice(THINGS)} {source.choice(PLACES)}."
