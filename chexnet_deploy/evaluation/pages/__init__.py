"""HTML pages of bench and evaluate; matplotlib and jinja2 are imported here alone."""
