"""One projected gradient step on noise."""
