"""The HTTP service on one bundle: Open Inference Protocol v2, plain predictions, metrics and a page. Opened by the command line."""
