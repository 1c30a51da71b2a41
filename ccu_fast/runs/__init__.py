"""What the long runs of both systems share."""
