"""ONNX bundle -> plan, on the GPU it will run on."""
