"""A protection run over a dataset on a disk: several processes, checkpoints, resuming."""

from ccu_fast.mem.job.protect import BadData, Job, protect_dataset

__all__ = ["BadData", "Job", "protect_dataset"]
