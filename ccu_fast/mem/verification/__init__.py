"""A published dataset, checked before it goes out: files, pictures, captions, and how far it is from the original."""

from ccu_fast.mem.verification.checks import verify, verify_and_show

__all__ = ["verify", "verify_and_show"]
