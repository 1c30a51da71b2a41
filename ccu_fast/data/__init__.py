"""Data sets: two-modality containers and the real data the examples run on."""
