"""What of the submitter's environment reaches Slurm's commands and the jobs."""

from __future__ import annotations

from posttrain.launch.slurm.commands import clean_environment

OUTSIDE = {"HOME": "/h", "SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/c", "SQUEUE_STATES": "RUNNING", "SCANCEL_STATE": "R"}
INSIDE = {**OUTSIDE, "SLURM_JOB_ID": "3", "SLURM_NTASKS": "8", "CUDA_VISIBLE_DEVICES": "1", "RANK": "0"}


def test_the_users_defaults_stay_outside_of_a_job() -> None:
    assert clean_environment(OUTSIDE) == {"HOME": "/h", "SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/c"}


def test_an_enclosing_job_leaves_nothing() -> None:
    assert clean_environment(INSIDE) == {"HOME": "/h", "SLURM_CONF": "/c"}


def test_devices_that_the_user_chose_outside_of_a_job_stay() -> None:
    assert clean_environment({"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}
