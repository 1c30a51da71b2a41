"""InfoNCE of a small paired batch."""
