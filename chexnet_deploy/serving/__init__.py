"""Where a bundle is served to many: a Triton model repository, and a Ray cluster for tables of millions of images."""
