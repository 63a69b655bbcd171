"""fp32 bundle -> fp16 and int8 bundles: ONNX to ONNX, on the CPU, gated before they are kept."""
