"""A protection run over a dataset on a disk: several processes, checkpoints, resuming; and what it will cost."""

from ccu_fast.data.captions import BadData
from ccu_fast.mem.job.estimate import estimate
from ccu_fast.mem.job.job import Job
from ccu_fast.mem.job.protect import protect_dataset

__all__ = ["BadData", "Job", "estimate", "protect_dataset"]
