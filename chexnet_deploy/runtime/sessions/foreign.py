"""A Session on a model that isn't a bundle: its contract on both sides of an ONNX file or of an endpoint.

Such a model has no activation maps: they are returned with no cells. It has no known answers either: opened, it must give the
same answer twice.
"""

from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MissingPackageError, SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.contract import Contract
from chexnet_deploy.runtime.sessions.base import MAX_BATCH, Logits, Maps, Provider, check_pixels

REPEAT_TOLERANCE: Final = 2e-3
"""What an answer may differ by when the same images are asked again, in logits times max(1, |logit|)."""
MIN_IMAGES: Final = 32
"""On so many at the least some logit lies outside 0 to 1."""
_ONNX_TYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
}


class Transport(Protocol):
    """Brings tensors to a model and answers back.

    Attributes:
        name: what errors call the model.
        dtype: of its input.
        batch: images that it takes in one call at most.
        is_fixed: it takes exactly so many.
        is_remote: somebody else runs it, who may change it.
    """

    name: str
    dtype: np.dtype[Any]
    batch: int
    is_fixed: bool
    is_remote: bool

    def ask(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Return the output tensor.

        Raises:
            SessionError: there is none.
        """
        ...

    def conv_types(self, tensor: NDArray[Any]) -> Mapping[str, int]:
        """Return as Session.conv_types; empty where nobody can know."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class ForeignSession:
    """One model behind its contract. Safe to call from several threads at once, as its transport is.

    Args:
        contract: what the model takes and answers.
        transport: of the model.

    Raises:
        SessionError: its input can't hold what the contract says.
    """

    def __init__(self, contract: Contract, transport: Transport) -> None:
        self.batch_range = (1, MAX_BATCH)  # in as many calls as the model needs
        self._contract = contract
        self._transport = transport
        self._table = contract.input.table(transport.dtype)
        self._is_open = True
        self._n_images, self._is_beyond = 0, False  # answered; with a value that no probability has

    @property
    def is_remote(self) -> bool:
        """Somebody else runs the model, who may change it meanwhile."""
        return self._transport.is_remote

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return logits, and maps [N, C, 0, 0], of uint8 pixels [N, 1, S, S]; see Session.run."""
        if not self._is_open:
            raise SessionError("this session is closed. Open the model again.")
        check_pixels(pixels, self._contract.input.size, self.batch_range)
        tensor = self._contract.input.fill(pixels, self._table)
        step = self._transport.batch
        values = np.concatenate([self._ask(tensor[i : i + step]) for i in range(0, len(tensor), step)])
        self._n_images += len(values)
        self._is_beyond = self._is_beyond or bool((values < 0.0).any() or (values > 1.0).any())
        try:
            logits = self._contract.output.to_logits(values)
        except SessionError as err:
            raise SessionError(f"{self._transport.name}: {err}") from err
        return logits, np.zeros((*logits.shape, 0, 0), np.float32)

    def check_again(self, pixels: Pixels, logits: Logits) -> None:
        """Ask for the same images again.

        Raises:
            SessionError: the answer is another one.
        """
        again, _ = self.run(pixels)
        gap = float((np.abs(again - logits) / np.maximum(1.0, np.abs(logits))).max())
        if not gap <= REPEAT_TOLERANCE:
            raise SessionError(
                f"{self._transport.name}: asked for the same images again it answers otherwise, by {gap:.2g} logits; needed the "
                f"same answer. Find out whether it draws at random, or is several models, or was changed meanwhile."
            )

    def refuse_probabilities(self) -> None:
        """Refuse logits that have all been between 0 and 1, on images enough to tell.

        Raises:
            SessionError: they are probabilities: as logits each would be one of 0.5 to 0.73.
        """
        if self._contract.output.values == "logits" and self._n_images >= MIN_IMAGES and not self._is_beyond:
            raise SessionError(
                f"{self._transport.name}: found answers of 0 to 1 alone to {self._n_images:,} images, needed logits, as the "
                f"contract calls them. Correct output.values: a sigmoid's or a softmax's answers look so."
            )

    def conv_types(self) -> Mapping[str, int]:
        """Return how many convolutions run in each type; empty for an endpoint, where nobody can know."""
        one = np.zeros((1, 1, self._contract.input.size, self._contract.input.size), np.uint8)
        return self._transport.conv_types(self._contract.input.fill(one, self._table))

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return nothing: the stages can't be told apart."""
        return {}

    def close(self) -> None:
        """Free the model."""
        self._is_open = False
        self._transport.close()

    def _ask(self, tensor: NDArray[Any]) -> NDArray[np.float64]:
        n, n_outputs, name = len(tensor), len(self._contract.output.findings), self._transport.name
        if self._transport.is_fixed:
            tensor = np.concatenate([tensor, np.repeat(tensor[-1:], self._transport.batch - n, axis=0)])
        values = self._transport.ask(tensor)
        # One output may come without an axis of its own.
        is_right = values.shape == (len(tensor), n_outputs) or (values.shape == (len(tensor),) and n_outputs == 1)
        if not is_right or values.dtype.kind != "f":
            raise SessionError(
                f"{name}: found an answer of {values.dtype} {list(values.shape)}, needed floats [{len(tensor)}, {n_outputs}], "
                f"{n_outputs} being the contract's findings. Correct output.name and output.findings, or the model."
            )
        if not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise SessionError(
                f"{name}: found NaN or infinity in an answer, needed numbers of float32. Don't use this model; mend it first."
            )
        return values.reshape(len(tensor), n_outputs)[:n].astype(np.float64)


class OnnxTransport:
    """An ONNX file in ONNX Runtime.

    Args:
        name: what errors call it.
        model: its bytes.
        contract: what it takes and answers.
        threads: threads for one call; None lets ONNX Runtime take all cores.
        provider: what it runs on; "auto" is the CPU.

    Raises:
        SessionError: ONNX Runtime refuses the file, or its tensors aren't the contract's.
        MissingPackageError: ONNX Runtime is not installed.
    """

    is_remote = False

    def __init__(self, name: str, model: bytes, contract: Contract, *, threads: int | None, provider: Provider) -> None:
        try:
            from chexnet_deploy.runtime.sessions import ort
        except ModuleNotFoundError as err:
            raise MissingPackageError("onnxruntime is not installed. Run: pip install 'chexnet-deploy[cpu]'") from err
        self.name = name
        self._model, self._provider = model, "cpu" if provider == "auto" else provider
        try:
            self._session: Any = ort.load_onnx(model, ort.session_options(threads), self._provider)
        except SessionError as err:
            raise SessionError(f"{name}: {err}") from err
        taken = self._session.get_inputs()
        found = _choose(name, "input", {each.name: each for each in taken}, contract.input.name)
        if len(taken) > 1:
            raise SessionError(
                f"{name}: found {len(taken)} inputs, needed one. Export the model with the picture alone."
            )
        self._input = found.name
        outputs = {each.name: each for each in self._session.get_outputs()}
        self._output = _choose(name, "output", outputs, contract.output.name).name
        if found.type not in _ONNX_TYPES:
            raise SessionError(
                f"{name}: found an input of {found.type}, needed one of {', '.join(_ONNX_TYPES)}. Export it so."
            )
        self.dtype = np.dtype(_ONNX_TYPES[found.type])
        fixed = check_shape(name, found.shape, contract)
        self.is_fixed, self.batch = fixed is not None, fixed or MAX_BATCH

    def ask(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Run the model; see Transport.ask."""
        try:
            (values,) = self._session.run([self._output], {self._input: tensor})
        except Exception as err:
            raise SessionError(
                f"{self.name}: found no answer to a batch of {len(tensor)}, needed one. Export it with its batch open throughout, "
                f"or fixed. ONNX Runtime says: {err}"
            ) from err
        answer: NDArray[Any] = np.asarray(values)
        return answer

    def conv_types(self, tensor: NDArray[Any]) -> Mapping[str, int]:
        """Return how many convolutions ONNX Runtime runs in each type."""
        from chexnet_deploy.runtime.sessions.ort import count_conv_types

        batch = np.repeat(tensor, self.batch if self.is_fixed else 1, axis=0)
        return count_conv_types(self._model, self._provider, {self._input: batch})

    def close(self) -> None:
        """Free the model."""
        self._session = None


def _choose(name: str, kind: str, found: Mapping[str, Any], wanted: str | None) -> Any:
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    if wanted is None or wanted not in found:
        asked = "no name of it" if wanted is None else ascii(wanted)
        raise SessionError(
            f"{name}: found {kind}s {', '.join(map(ascii, found))}, and {asked} in the contract; needed one of them. "
            f"Correct {kind}.name."
        )
    return found[wanted]


def check_shape(name: str, found: Any, contract: Contract) -> int | None:
    """Return the batch size that a model's input declares; None where it is open.

    Args:
        name: what errors call the model.
        found: its dimensions; open ones are no numbers, or below 1.
        contract: what they should be.

    Raises:
        SessionError: they are others.
    """
    wanted = contract.input.shape(0)[1:]
    dims = [dim if isinstance(dim, int) and dim > 0 else None for dim in found]
    if len(dims) != 4 or any(dim is not None and dim != need for dim, need in zip(dims[1:], wanted, strict=True)):
        shown = ", ".join("?" if dim is None else str(dim) for dim in dims)
        raise SessionError(
            f"{name}: found an input of [{shown}], needed [?, {', '.join(map(str, wanted))}] by the contract "
            f"({contract.input.layout}, {contract.input.channels}, {contract.input.size} px). Correct the contract's input."
        )
    return dims[0]
