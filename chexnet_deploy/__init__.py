"""chexnet-deploy."""
