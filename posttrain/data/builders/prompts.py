"""Built-in prompts: every task with every topic. Written for this project; a topic is what the split keeps together."""

from __future__ import annotations

import hashlib

TASKS = (
    "Explain {topic} to a curious twelve-year-old.",
    "Write a short encyclopedia entry about {topic}.",
    "What are three common misunderstandings about {topic}? Answer in full sentences.",
    "Write a dialogue between two friends who disagree about {topic}.",
    "Tell a short story in which {topic} matters.",
    "Write a letter to a newspaper about {topic}.",
    "Give step-by-step advice to a beginner who wants to learn about {topic}.",
    "Summarise the history of {topic} in two paragraphs.",
    "Write five questions about {topic} and answer each in one or two sentences.",
    "Compare {topic} today with {topic} a hundred years ago.",
    "Describe a day in the life of someone who works with {topic}.",
    "Make an argument for and an argument against spending more public money on {topic}.",
)

TOPICS = (
    "rivers", "bread baking", "prime numbers", "volcanoes", "railways", "chess", "the human heart", "bees",
    "electric motors", "public libraries", "the water cycle", "gardening", "maps", "glass", "sleep", "music theory",
    "the printing press", "tides", "bicycles", "probability", "coral reefs", "bridges", "coffee", "the night sky",
    "vaccines", "weaving", "photography", "earthquakes", "computer programs", "migrating birds", "money", "clocks",
    "paper", "wind power", "the alphabet", "soil", "lighthouses", "theatre", "steel", "swimming",
    "spices", "forests", "radio", "pottery", "the immune system", "cheese", "canals", "encryption",
    "mountaineering", "dictionaries", "ice", "orchestras", "city parks", "sailing", "salt", "statistics",
    "insects", "architecture", "translation", "batteries",
)  # fmt: skip


def built_in(count: int) -> list[tuple[str, str]]:
    """`count` pairs (topic, prompt), in an order that mixes topics and tasks; starts over when all were used."""
    pairs = [(topic, task.format(topic=topic)) for topic in TOPICS for task in TASKS]
    pairs.sort(key=lambda pair: hashlib.sha256(pair[1].encode()).digest())
    return [pairs[number % len(pairs)] for number in range(count)]
