"""``python -m benchmarks.unlearning``: every method of unlearning on both embedded tasks, three seeds."""
