"""Verifiable rewards: answers are scored in processes that may hang, crash or be attacked without harm."""
