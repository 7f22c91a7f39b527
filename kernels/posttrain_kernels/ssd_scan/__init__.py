"""The selective state-space recurrence of Mamba-2: over whole sequences for training and prompts, and one step."""

from .op import ssd_scan, ssd_step
from .reference import ssd_scan_reference, ssd_step_reference

__all__ = ["ssd_scan", "ssd_scan_reference", "ssd_step", "ssd_step_reference"]
