"""One table from a Ray cluster."""
