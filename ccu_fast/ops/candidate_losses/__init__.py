"""The loss of a batch with one caption replaced."""
