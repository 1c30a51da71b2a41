"""Image-caption datasets on a disk: listed once, decoded when asked for, written back in their own layout."""

from ccu_fast.data.captions.dataset import DiskSource, Scan, scan
from ccu_fast.data.captions.formats import list_pairs
from ccu_fast.data.captions.listing import FORMATS, Bad, BadData, Listing, Options

__all__ = ["FORMATS", "Bad", "BadData", "DiskSource", "Listing", "Options", "Scan", "list_pairs", "scan"]
