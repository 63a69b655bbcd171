"""A bundle served to many: an HTTP service, a Triton model repository, and a Ray cluster for tables of millions of images."""
