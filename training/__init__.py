"""Training: data in, checkpoint out. Not part of the wheel."""
