"""The noise of a data set."""
