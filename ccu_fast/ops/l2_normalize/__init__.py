"""Rows of unit length."""
