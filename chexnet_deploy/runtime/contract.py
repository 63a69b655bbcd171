"""A contract: what a model that isn't a bundle takes and answers, as its user states it in a TOML file.

A bundle says all of this itself. Turns pixels into a model's input and its output into logits; runs nothing.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, ValidationError, model_validator

from chexnet_deploy.datasets.csv_rows import letters_of
from chexnet_deploy.errors import SessionError, SpecError
from chexnet_deploy.images import Pixels, Resizing
from chexnet_deploy.inputs import StrictRecord, describe, read_toml
from chexnet_deploy.runtime.sessions.base import Logits

IGNORED: Final = ""
"""Stands in `findings` for an output that nobody measures: TOML has no null."""
SUM_TOLERANCE: Final = 1e-2  # fifteen float16 probabilities sum to 1 within 0.4 %
_HIGHEST: Final = 1 - 2.0**-25  # halfway between float32's largest probability and 1

_TensorName: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Finding: TypeAlias = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9][A-Za-z0-9_ -]{0,63})?$")]
_Probability: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]


class Input(StrictRecord):
    """What the model takes: ((gray / 255) stretched to `range` - mean) / std.

    Attributes:
        name: of the tensor; may be left out where the model has one input.
        layout: order of the axes; N images, C channels, H rows, W columns.
        channels: "rgb" and "bgr" hold the same gray picture three times; they say in which order the model wants `mean` and
            `std`, which are red, green, blue here.
        size: side of the square, in px.
        range: what black and white become, before `mean` and `std`.
        mean: one number, or one a channel.
        std: likewise.
        interpolation: Pillow's filter that the picture is resized with.
        geometry: see Resizing.
    """

    name: _TensorName | None = None
    layout: Literal["NCHW", "NHWC"]
    channels: Literal["gray", "rgb", "bgr"]
    size: Annotated[int, Field(ge=8, le=2048)]
    range: tuple[float, float]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0.0)], ...] = (1.0,)
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
    geometry: Literal["squash", "crop"] = "squash"

    @model_validator(mode="after")
    def _is_consistent(self) -> "Input":
        if self.range[0] == self.range[1]:
            raise ValueError(f"range: black and white are both {self.range[0]:g}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, self.n_channels}:
                raise ValueError(
                    f"{name}: {len(values)} numbers for {self.n_channels} channels; needed one, or one each"
                )
        return self

    @property
    def n_channels(self) -> int:
        """1 or 3."""
        return 1 if self.channels == "gray" else 3

    @property
    def resizing(self) -> Resizing:
        """How a picture becomes pixels, before they are normalised."""
        return Resizing.model_validate(
            {"resize_px": self.size, "resample": f"pillow-{self.interpolation}-8bit", "geometry": self.geometry}
        )

    def shape(self, n: int) -> tuple[int, ...]:
        """Return the shape of n images' tensor."""
        side, channels = self.size, self.n_channels
        return (n, channels, side, side) if self.layout == "NCHW" else (n, side, side, channels)

    def table(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return [C, 256]: what each gray level becomes in each channel.

        Raises:
            SessionError: the model takes whole numbers, and these are none, or out of its type's range.
        """
        low, high = self.range
        stretched = low + np.arange(256) / 255 * (high - low)
        mean, std = (np.broadcast_to(values, self.n_channels)[:, None] for values in (self.mean, self.std))
        table = (stretched - mean) / std
        if self.channels == "bgr":
            table = table[::-1]
        if dtype.kind in "iu":
            whole, limits = np.round(table), np.iinfo(dtype)
            if np.abs(table - whole).max() > 1e-6 or whole.min() < limits.min or whole.max() > limits.max:
                raise SessionError(
                    f"the model takes {dtype}, and by its contract gray 0 to 255 become {table.min():g} to {table.max():g}; "
                    f"needed whole numbers of {limits.min} to {limits.max}. Correct range, mean and std."
                )
            table = whole
        filled: NDArray[Any] = table.astype(dtype)
        return filled

    def fill(self, pixels: Pixels, table: NDArray[Any]) -> NDArray[Any]:
        """Return the tensor of pixels [N, 1, S, S] by a `table`."""
        channels = np.stack([levels[pixels[:, 0]] for levels in table], axis=1 if self.layout == "NCHW" else 3)
        return np.ascontiguousarray(channels)


class Output(StrictRecord):
    """What the model answers, and which score of it is measured.

    Attributes:
        name: of the tensor [N, K]; may be left out where the model has one output.
        findings: [K] names in the tensor's order; "" for what is ignored.
        values: "logits"; or "sigmoids", a probability each; or "softmax", probabilities that sum to 1 over all K.
        score: of logits alone, and stated there: "logit" takes each as it is, its probability being its sigmoid; "softmax" takes
            the softmax over all K.
    """

    name: _TensorName | None = None
    findings: Annotated[tuple[_Finding, ...], Field(min_length=1, max_length=256)]
    values: Literal["logits", "sigmoids", "softmax"]
    score: Literal["logit", "softmax"] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "Output":
        named = [finding for finding in self.findings if finding != IGNORED]
        n_different = len(set(map(letters_of, named)))  # capitals and blanks don't tell columns of labels apart
        if not named or n_different < len(named):
            raise ValueError(
                f"findings: {len(named)} names, {n_different} of them different; needed one or more, each once"
            )
        if (self.values == "logits") != (self.score is not None):
            raise ValueError(
                f'score: {self.score!r} of {self.values}; needed "logit" or "softmax" of logits, and none else'
            )
        if len(self.findings) == 1 and "softmax" in (self.values, self.score):
            raise ValueError("a softmax of one output is always 1; needed two or more findings")
        return self

    def to_logits(self, values: NDArray[np.floating]) -> Logits:
        """Return float32 [N, C] of the named findings: the log-odds of what is measured.

        Args:
            values: [N, K], finite.

        Raises:
            SessionError: they are not what the contract says they are.
        """
        values = np.asarray(values, np.float64)
        if self.values != "logits":
            logits = self._log_odds(values)
        elif self.score == "softmax":
            # log(p / (1 - p)) of p = softmax: z minus the log-sum-exp of the others, which saturates nowhere.
            shifted = values - values.max(axis=1, keepdims=True)
            n = shifted.shape[1]
            others = np.where(np.eye(n, dtype=np.bool_), -np.inf, shifted[:, None, :])
            logits = shifted - np.logaddexp.reduce(others, axis=2)
        else:
            logits = values
        named = [k for k, finding in enumerate(self.findings) if finding != IGNORED]
        return logits[:, named].astype(np.float32)

    def _log_odds(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        if values.min() < 0.0 or values.max() > 1.0:
            raise SessionError(
                f"found answers of {values.min():.4g} to {values.max():.4g}, needed 0 to 1, as the contract calls them "
                f"{self.values}. Correct output.values, or the model."
            )
        if self.values == "softmax":
            sums = values.sum(axis=1)
            worst = float(sums[np.abs(sums - 1.0).argmax()])
            if abs(worst - 1.0) > SUM_TOLERANCE:
                raise SessionError(
                    f"found answers that sum to {worst:.4g}, needed 1, as the contract calls them a softmax. "
                    f"Correct output.values, or the model."
                )
        clipped = np.clip(values, np.finfo(np.float32).tiny, _HIGHEST)
        odds: NDArray[np.floating] = np.log(clipped) - np.log1p(-clipped)
        return odds


class Endpoint(StrictRecord):
    """How a served model is asked.

    Attributes:
        batch: images in one request at most.
        deadline_s: from a request's first byte to its answer's last; whatever is slower is an error.
    """

    batch: Annotated[int, Field(ge=1, le=256)] = 16
    deadline_s: Annotated[float, Field(gt=0.0, le=3600.0)] = 30.0


class Contract(StrictRecord):
    """One model's contract.

    Attributes:
        operating_points: probability at and above which a finding is called present; findings may be left out.
    """

    input: Input
    output: Output
    endpoint: Endpoint = Endpoint()
    operating_points: dict[str, _Probability] = Field(default={})

    @model_validator(mode="after")
    def _is_consistent(self) -> "Contract":
        unknown = sorted(set(self.operating_points) - set(self.findings))
        if unknown:
            raise ValueError(f"operating_points: {', '.join(unknown)}; needed names out of output.findings")
        return self

    @property
    def findings(self) -> tuple[str, ...]:
        """[C] names of what is measured, in order."""
        return tuple(finding for finding in self.output.findings if finding != IGNORED)


def read_contract(path: Path) -> Contract:
    """Read a contract.

    Raises:
        SpecError: not TOML, or a field is unknown, missing or out of range.
    """
    try:
        # By JSON, in which a list is what becomes a tuple; strict Python wants a tuple from the start.
        return Contract.model_validate_json(json.dumps(read_toml(path), default=str), strict=True)
    except ValidationError as err:
        raise SpecError(f"{path}: {describe(err)}. See docs/foreign-models.md for the fields.") from err
