"""ccu_fast inside other libraries, without a change to their code: a file for each library."""

from ccu_fast.patch.patch import TARGETS, active, applied, apply, revert, targets

__all__ = ["TARGETS", "active", "applied", "apply", "revert", "targets"]
