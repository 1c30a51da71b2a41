"""Reductions over a similarity matrix that is never stored."""
