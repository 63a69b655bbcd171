"""See inside a model: its quantised activations, as ONNX Runtime computes them."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.ort import load_onnx, session_options

# Field numbers of onnx.proto with the wire type of what has a length: (number << 3) | 2.
_MODEL_GRAPH: Final = bytes([7 << 3 | 2])
_GRAPH_OUTPUT: Final = bytes([12 << 3 | 2])
_OUTPUT_NAME: Final = bytes([1 << 3 | 2])


class OrtActivations:
    """One int8 model in ONNX Runtime on one core, answering with its activations.

    Args:
        model: the ONNX file's bytes.
        names: of its tensors of int8 or uint8.

    Raises:
        SessionError: ONNX Runtime refuses the model, or it has no such tensors.
    """

    def __init__(self, model: bytes, names: Sequence[str]) -> None:
        self._names = list(names)
        self._session = load_onnx(with_outputs(model, names), session_options(1))

    def saturated_shares(self, pixels: Pixels) -> NDArray[np.float64]:
        """Return for each tensor the share of its values at an end of its range.

        Zero, the lower end of unsigned tensors, is what ReLU leaves and doesn't count.

        Args:
            pixels: uint8 [N, 1, S, S].

        Raises:
            SessionError: ONNX Runtime failed.
        """
        try:
            tensors = self._session.run(self._names, {"pixels": pixels})
        except Exception as err:
            raise SessionError(f"ONNX Runtime failed on a batch of {len(pixels)}: {err}") from err
        return np.array([_saturated_share(tensor) for tensor in tensors])


def with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """Return an ONNX file with further tensors among its outputs.

    Done on the bytes, as whoever runs a model has no onnx package: a protobuf message with another of its type behind it is
    both of them merged, lists joined (protobuf.dev/programming-guides/encoding, "last one wins").

    Args:
        model: a serialised ModelProto.
        names: of tensors that its graph computes.
    """
    outputs = b"".join(_field(_GRAPH_OUTPUT, _field(_OUTPUT_NAME, name.encode())) for name in names)
    return model + _field(_MODEL_GRAPH, outputs)


def _field(key: bytes, content: bytes) -> bytes:
    length, n_left = bytearray(), len(content)
    while n_left > 0x7F:  # base-128 varint
        length.append(n_left & 0x7F | 0x80)
        n_left >>= 7
    length.append(n_left)
    return key + bytes(length) + content


def _saturated_share(tensor: NDArray[np.integer]) -> float:
    ends = np.iinfo(tensor.dtype)
    n = np.count_nonzero(tensor == ends.max)
    if ends.min < 0:
        n += np.count_nonzero(tensor == ends.min)
    return float(n) / tensor.size
