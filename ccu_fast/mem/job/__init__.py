"""A protection run over a dataset on a disk: several processes, checkpoints, resuming."""

from ccu_fast.data.captions import BadData
from ccu_fast.mem.job.protect import Job, protect_dataset

__all__ = ["BadData", "Job", "protect_dataset"]
