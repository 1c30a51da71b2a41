"""The operations: a folder each, named after the function it serves; the only code that knows backends."""
