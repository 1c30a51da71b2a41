"""The command ``ccu-fast``."""
