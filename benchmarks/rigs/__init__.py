"""What benchmarks and tests share to set up."""
