"""ccu_fast inside other libraries, without a change to their code: a file for each library."""

from ccu_fast.patch.patch import TARGETS, Calls, active, applied, apply, calls, revert, targets

__all__ = ["TARGETS", "Calls", "active", "applied", "apply", "calls", "revert", "targets"]
