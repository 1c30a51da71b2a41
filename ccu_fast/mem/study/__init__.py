"""The comparison of protections on the embedded task."""
