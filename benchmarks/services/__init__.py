"""The node, the HTTP service and Ray under load and attack."""
