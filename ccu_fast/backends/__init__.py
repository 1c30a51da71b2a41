"""The implementations behind the operations; :mod:`.registry` chooses between them."""
