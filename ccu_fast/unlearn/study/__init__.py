"""The comparison of methods on the embedded tasks."""
