"""Small runs of protection over a dataset on a disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ccu_fast.mem.config import Settings
from ccu_fast.mem.job import Job
from ccu_fast.mem.job.models import small

SHAPE = (3, 16, 16)
TINY = Settings(
    eps=8, step=4, pgd_steps=2, rounds=2, trigger_rounds=1, trigger_words=8, candidates=4, surrogate_steps=2, batch=4
)


def job(source: Path, out: Path, **options: Any) -> Job:
    """Of thumbnails, unless it is told otherwise."""
    model = partial(small, image_shape=SHAPE, width=32)
    return Job(source, out, model, **{"settings": TINY, "threads": 2, "thumbnails": True, **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
