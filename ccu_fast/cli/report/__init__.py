"""Pictures, tables and the HTML page made from a demo's results."""
