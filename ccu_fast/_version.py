"""The version, where everybody can import it from."""

__version__ = "0.2.0"
