"""Checkpoint -> fp32 ONNX; torch is imported here alone."""
