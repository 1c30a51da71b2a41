"""Two-modality models."""
