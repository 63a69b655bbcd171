"""What a contract says is what the model gets, and what of its answer is measured."""

from pathlib import Path

import numpy as np
import pytest

from chexnet_deploy.errors import SessionError, SpecError
from chexnet_deploy.runtime.contract import Contract, Input, Output, read_contract
from chexnet_deploy.runtime.sessions.base import sigmoid

TAKES = {"layout": "NCHW", "channels": "gray", "size": 32, "range": (0.0, 1.0), "interpolation": "bilinear"}
FLOAT = np.dtype(np.float32)
LEAST = """
[input]
layout = "NCHW"
channels = "gray"
size = 224
range = [0, 1]
interpolation = "bilinear"
[output]
findings = ["Mass", "", "Hernia"]
values = "logits"
score = "logit"
"""


def takes(**changes: object) -> Input:
    return Input.model_validate({**TAKES, **changes})


def answers(values: str, score: str | None, *findings: str) -> Output:
    return Output.model_validate({"findings": findings, "values": values, "score": score})


def test_gray_levels_become_what_the_contract_says() -> None:
    # torchxrayvision: black -1024, white 1024.
    assert takes(range=(-1024.0, 1024.0)).table(FLOAT)[0, [0, 255]].tolist() == [-1024.0, 1024.0]
    # (0.2 - 0.485) / 0.229, gray 51 being 0.2 of white.
    normalised = takes(mean=(0.485,), std=(0.229,)).table(FLOAT)
    assert normalised[0, 51] == pytest.approx(-0.285 / 0.229, abs=1e-6)
    assert takes(range=(1.0, 0.0)).table(FLOAT)[0, [0, 255]].tolist() == [1.0, 0.0]  # inverted


def test_blue_comes_first_where_the_model_wants_it_so() -> None:
    colour = {"channels": "rgb", "mean": (1.0, 2.0, 3.0), "std": (1.0, 1.0, 1.0)}
    assert takes(**colour).table(FLOAT)[:, 0].tolist() == [-1.0, -2.0, -3.0]
    assert takes(**{**colour, "channels": "bgr"}).table(FLOAT)[:, 0].tolist() == [-3.0, -2.0, -1.0]


@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (2, 3, 32, 32)), ("NHWC", (2, 32, 32, 3))])
def test_the_axes_are_in_the_models_order(layout: str, shape: tuple[int, ...]) -> None:
    given = takes(channels="rgb", layout=layout, mean=(0.0, 1.0, 2.0))
    pixels = np.zeros((2, 1, 32, 32), np.uint8)
    pixels[1, 0, 3, 5] = 255
    tensor = given.fill(pixels, given.table(FLOAT))
    assert tensor.shape == given.shape(2) == shape
    corner = tensor[1, :, 3, 5] if layout == "NCHW" else tensor[1, 3, 5]
    assert corner.tolist() == [1.0, 0.0, -1.0]


def test_whole_numbers_are_given_where_the_model_takes_them_and_nothing_is_rounded() -> None:
    assert takes(range=(0.0, 255.0)).table(np.dtype(np.uint8))[0].tolist() == list(range(256))
    assert takes(range=(-128.0, 127.0)).table(np.dtype(np.int8))[0, [0, 255]].tolist() == [-128, 127]
    for wrong, dtype in (((0.0, 1.0), np.uint8), ((0.0, 255.0), np.int8)):
        with pytest.raises(SessionError, match="needed whole numbers"):
            takes(range=wrong).table(np.dtype(dtype))


def test_logits_are_taken_as_they_are_and_ignored_outputs_left_out() -> None:
    logits = answers("logits", "logit", "Mass", "", "Hernia").to_logits(np.array([[1.5, 9.0, -2.0]]))
    assert (logits.tolist(), logits.dtype) == ([[1.5, -2.0]], np.float32)


def test_a_softmax_is_over_all_outputs_and_saturates_nowhere() -> None:
    values = np.log([[1.0, 2.0, 5.0]])  # probabilities 1/8, 2/8, 5/8
    of_logits = answers("logits", "softmax", "Mass", "", "Hernia").to_logits(values)
    assert sigmoid(of_logits)[0].tolist() == pytest.approx([1 / 8, 5 / 8])
    of_softmax = answers("softmax", None, "Mass", "", "Hernia").to_logits(np.array([[1 / 8, 2 / 8, 5 / 8]]))
    np.testing.assert_allclose(of_logits, of_softmax, atol=1e-6)
    # 200 above the rest: its odds are e^200 to two, where a probability would be 1.
    far = answers("logits", "softmax", "Mass", "Hernia", "Edema").to_logits(np.array([[200.0, 0.0, 0.0]]))
    assert far[0, 0] == pytest.approx(200 - np.log(2))


def test_sigmoids_become_their_log_odds() -> None:
    logits = answers("sigmoids", None, "Mass", "Hernia").to_logits(np.array([[0.75, 0.5], [1.0, 0.0]]))
    assert logits[0].tolist() == pytest.approx([np.log(3), 0.0])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("values", "answer", "found"),
    [
        ("sigmoids", [[1.5, 0.2]], "0.2 to 1.5"),
        ("softmax", [[-0.1, 1.1]], "-0.1 to 1.1"),
        ("softmax", [[0.9, 0.9]], "1.8"),
    ],
)
def test_answers_that_are_not_what_the_contract_calls_them(values: str, answer: list[list[float]], found: str) -> None:
    with pytest.raises(SessionError, match=found):
        answers(values, None, "Mass", "Hernia").to_logits(np.array(answer))


def test_a_contract_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(f"{LEAST}[operating_points]\nMass = 0.25\n")
    contract = read_contract(path)
    assert contract.findings == ("Mass", "Hernia")
    assert contract.operating_points == {"Mass": 0.25}
    assert contract.input.resizing.resample == "pillow-bilinear-8bit"
    assert Contract.model_validate_json(contract.model_dump_json()) == contract


@pytest.mark.parametrize(
    ("line", "instead", "found"),
    [
        ('layout = "NCHW"', "", "input.layout: Field required"),
        ('channels = "gray"', 'channels = "grey"', "input.channels"),
        ("size = 224", "size = 4", "input.size"),
        ("range = [0, 1]", "range = [1, 1]", "black and white are both 1"),
        ("range = [0, 1]", "range = [0, nan]", "input.range"),
        ("range = [0, 1]", "range = [0, 1]\nstd = [0]", "input.std"),
        ("range = [0, 1]", "range = [0, 1]\nmean = [0.1, 0.2, 0.3]", "3 numbers for 1 channels"),
        ('interpolation = "bilinear"', 'interpolation = "area"', "input.interpolation"),
        ('"Mass", "", "Hernia"', '"Mass", "Mass"', "2 names, 1 of them different"),
        ('"Mass", "", "Hernia"', '"Lung Opacity", "lung_opacity"', "2 names, 1 of them different"),
        ('"Mass", "", "Hernia"', '"", ""', "0 names"),
        ('"Mass", "", "Hernia"', '"../Mass"', "output.findings"),
        ('values = "logits"', 'values = "probabilities"', "output.values"),
        ('score = "logit"', "", "score: None of logits"),
        ('values = "logits"', 'values = "sigmoids"', "score: 'logit' of sigmoids"),
        ('"Mass", "", "Hernia"]\nvalues = "logits"\nscore = "logit"', '"Mass"]\nvalues = "softmax"', "always 1"),
        ('score = "logit"', 'score = "logit"\n[operating_points]\nEdema = 0.5', "operating_points: Edema"),
        ('score = "logit"', 'score = "logit"\n[endpoint]\ndeadline_s = 0', "endpoint.deadline_s"),
        ("[output]", "[outputs]", "output: Field required"),
    ],
)
def test_a_wrong_contract_is_refused_by_its_field(line: str, instead: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(LEAST.replace(line, instead, 1))
    with pytest.raises(SpecError) as caught:
        read_contract(path)
    assert found in str(caught.value)
    assert "docs/foreign-models.md" in str(caught.value)
