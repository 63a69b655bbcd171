"""Take what int8 adds to every logit on average out of the head's bias, which is added in float32 after everything else.

Bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2) of the last layer alone: the mean error of each finding's logit
on the calibration images is much the same on other images, and correcting it costs nothing. Left in, it moves decisions at an
operating point all one way, and AUROC does not see it.
"""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from chexnet_deploy.export.quantize.graph_edits import copy_of, producers_of
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession


def correct_head_bias(model: onnx.ModelProto, reference: Logits, pixels: Pixels) -> onnx.ModelProto:
    """Return the model with a head bias that makes its mean logits those of the reference.

    Args:
        model: quantised.
        reference: [N, C] the fp32 model's logits of the same images.
        pixels: uint8 [N, 1, S, S] of the calibration images.
    """
    session = OrtSession(model.SerializeToString(), pixels.shape[-1])
    logits, _ = run_in_batches(session, pixels)
    session.close()
    corrected = copy_of(model)
    bias = _head_bias(corrected)
    shift = (logits.astype(np.float64) - reference).mean(axis=0)
    values = numpy_helper.to_array(bias).astype(np.float64) - shift
    bias.CopyFrom(numpy_helper.from_array(values.astype(np.float32), bias.name))
    return corrected


def read_head_bias(model: onnx.ModelProto) -> NDArray[np.float32]:
    """Return [C] what is added to the maps' means to give the logits."""
    values: NDArray[np.float32] = numpy_helper.to_array(_head_bias(model))
    return values


def _head_bias(model: onnx.ModelProto) -> onnx.TensorProto:
    addition = producers_of(model.graph)["logits"]
    bias: onnx.TensorProto
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name in addition.input)
    return bias
