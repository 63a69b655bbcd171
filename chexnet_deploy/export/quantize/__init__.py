"""fp32 ONNX -> fp16 and the int8 variants; onnx is imported here alone."""
