"""digit-strips protected by every method: what victims learn, with transfer and robustness, several seeds."""
