"""Fused operators, each with a torch `reference` of the same contract. Imports torch and triton, not posttrain."""
