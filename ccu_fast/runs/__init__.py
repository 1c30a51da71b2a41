"""What a run of hours needs, once for both systems."""
