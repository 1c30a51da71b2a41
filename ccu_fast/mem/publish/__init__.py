"""Protected pairs written in the layout of their input: streamed, resumable, hashed."""

from ccu_fast.mem.publish.manifest import write_manifest
from ccu_fast.mem.publish.reference import write_reference_files
from ccu_fast.mem.publish.writer import Publisher

__all__ = ["Publisher", "write_manifest", "write_reference_files"]
