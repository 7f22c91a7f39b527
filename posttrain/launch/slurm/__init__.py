"""Runs on a Slurm cluster: a batch job a stage, rendered from one template, chained by dependencies."""
