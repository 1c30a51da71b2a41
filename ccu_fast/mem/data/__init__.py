"""Image-caption datasets on a disk: listed once, decoded when asked for, written back in their own layout."""

from ccu_fast.mem.data.dataset import DiskSource, Scan, scan
from ccu_fast.mem.data.listing import FORMATS, Bad, Listing, Options, list_pairs

__all__ = ["FORMATS", "Bad", "DiskSource", "Listing", "Options", "Scan", "list_pairs", "scan"]
