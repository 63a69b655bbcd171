"""A bundle over HTTP: Open Inference Protocol v2, /predict, a page and metrics."""
