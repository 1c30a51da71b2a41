"""Gradient token scoring."""
