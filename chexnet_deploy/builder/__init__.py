"""The TensorRT room: ONNX bundle + spec -> plan, on the machine it will run on."""
