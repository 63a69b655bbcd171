"""NVIDIA ModelOpt's ONNX quantisation, run by its own interpreter: MODEL PIXELS.npy max|entropy OUT.

Imports nothing of this project, whose onnx is another one.
"""

import sys

import numpy as np
from modelopt.onnx.quantization import quantize

if __name__ == "__main__":
    model, pixels, method, out = sys.argv[1:]
    quantize(
        model,
        quantize_mode="int8",
        calibration_data={"pixels": np.load(pixels)},
        calibration_method=method,
        calibration_eps=["cpu"],
        output_path=out,
    )
