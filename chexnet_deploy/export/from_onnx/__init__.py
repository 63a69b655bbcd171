"""Anyone's ONNX file by its contract -> fp32 bundle; onnx is imported here."""
