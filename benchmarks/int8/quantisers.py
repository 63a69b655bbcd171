"""How much of one fp32 CheXNet each int8 recipe keeps: ours, ours with a step taken away, and what others make of it.

    python -m benchmarks.int8.quantisers CHECKPOINT --data ROOT --name real [--interpreter modelopt=PYTHON] [--only TEXT]
    python -m benchmarks.int8.quantisers --name real --table

Every recipe gets the same fp32 graph and the same calibration images of training patients; all are judged on test images, none of
which took part in a choice. Each model runs where it is meant to: our `cpu` form and NNCF's in OpenVINO, with a fixed batch, as
OpenVINO answers NNCF's wrongly with an open one; all others in ONNX Runtime. No speeds here: see benchmarks/cpu/peers.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

from benchmarks.common import RESULTS
from benchmarks.int8.accuracy import MIN_POSITIVES, Accuracy, Against, Judge, cores, packages
from benchmarks.int8.recipes import (
    Answer,
    RecipeError,
    StaticOpenvino,
    modelopt_int8,
    nncf_int8,
    ort_convolutions,
    ort_default,
    without_equalising,
    without_gptq,
)
from chexnet_deploy.datasets import DataSet, open_data
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.to_onnx import trace
from chexnet_deploy.export.quantize.bias import correct_head_bias
from chexnet_deploy.export.quantize.calibration import MIN_IMAGES, CalibrationSet, choose_calibration
from chexnet_deploy.export.quantize.variants import Calibrated, Prepared, calibrate, choose_integers
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import Record
from chexnet_deploy.runtime.score import iter_pixels
from chexnet_deploy.runtime.sessions.base import Logits, run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession
from chexnet_deploy.terminal import run_program

BATCH = 16
N_DRAWS = 5
OURS, OURS_TYPED = "ours, cpu form", "ours, typed form"

app = typer.Typer(add_completion=False)


class Row(Record):
    """One recipe.

    Attributes:
        runs_in: what answered.
        seconds: to make the int8 model.
        against: whether ours is no worse; None for ours.
        why_not: why there are no numbers.
    """

    recipe: str
    runs_in: str
    n_calibration_images: int
    seconds: float | None = None
    accuracy: Accuracy | None = None
    against: Against | None = None
    why_not: str | None = None


class Results(Record):
    """All recipes on one model."""

    machine: Machine
    packages: dict[str, str]
    resize_px: int
    n_test_images: int
    n_test_patients: int
    fp32_mean_auroc: float
    rows: tuple[Row, ...]

    def with_rows_of(self, earlier: "Results") -> "Results":
        """Return these, and the earlier rows of other recipes, in their order; of another model or machine there are none."""
        if (earlier.machine.processor, earlier.fp32_mean_auroc) != (self.machine.processor, self.fp32_mean_auroc):
            return self
        mine = {row.recipe: row for row in self.rows}
        kept = {row.recipe: mine.get(row.recipe, row) for row in earlier.rows}
        return self.model_copy(update={"rows": tuple((kept | mine).values())})


@dataclass(frozen=True, slots=True)
class Recipe:
    """A name, where it runs, and how it is made of calibration pixels."""

    name: str
    runs_in: str
    pixels: Pixels
    make: Callable[[Pixels], bytes | Any]


@app.command()
def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A .safetensors checkpoint.")] = None,
    data: Annotated[Path | None, typer.Option(help="ChestX-ray14's layout.", envvar="CHEXNET_CHESTXRAY14")] = None,
    name: Annotated[str, typer.Option(help="results/quantisers-NAME.json is written or read.")] = "real",
    calibration_images: Annotated[int, typer.Option(help="For every recipe.")] = 256,
    interpreter: Annotated[str | None, typer.Option(help="modelopt=PYTHON of an environment that has it.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Beside our two forms only recipes whose names begin so; other results stay."),
    ] = None,
    table: Annotated[bool, typer.Option(help="Print the table of the committed results and stop.")] = False,
) -> None:
    """Measure every recipe, or print what was measured."""
    path = RESULTS / f"quantisers-{name}.json"
    if not table:
        if checkpoint is None or data is None:
            raise typer.BadParameter("give a checkpoint, and ChestX-ray14 by --data or CHEXNET_CHESTXRAY14")
        names = tuple(only or [""])
        results = measure(checkpoint, open_data(data), calibration_images, _modelopt_of(interpreter), names, typer.echo)
        if only and path.exists():
            results = results.with_rows_of(Results.model_validate_json(path.read_text()))
        path.write_text(results.model_dump_json(indent=1) + "\n")
    typer.echo(markdown_table(Results.model_validate_json(path.read_text())))


def measure(
    checkpoint: Path,
    dataset: DataSet,
    n_images: int,
    modelopt: Path | None,
    only: tuple[str, ...],
    say: Callable[[str], None],
) -> Results:
    """Make the model of every recipe whose name begins with one of `only`, and judge it on the test images."""
    read = read_checkpoint(checkpoint)
    manifest, model = read.manifest, trace(read)
    side = manifest.preprocessing.resize_px
    test = dataset.require("test").for_findings(manifest.findings)
    pixels = np.concatenate(list(iter_pixels(test.paths, manifest.preprocessing)))
    chosen, *draws = (
        CalibrationSet.read(dataset, names, manifest.preprocessing).pixels
        for names in (choose_calibration(dataset, n_images), *_draws(dataset))
    )
    judge = Judge(_ort_answer(model, side)(pixels), test, manifest.findings, manifest.operating_points)
    answers: dict[str, Logits] = {}
    rows = []
    for recipe in (*our_recipes(model, chosen, draws), *other_recipes(model, chosen, modelopt)):
        if recipe.name not in (OURS, OURS_TYPED) and not recipe.name.startswith(only):
            continue
        rows.append(_judge(recipe, judge, pixels, answers))
        say(rows[-1].model_dump_json())
    return Results(
        machine=describe_machine(),
        packages=packages(),
        resize_px=side,
        n_test_images=len(test.names),
        n_test_patients=len(np.unique(test.patients)),
        fp32_mean_auroc=judge.accuracy(judge.reference).mean_auroc,
        rows=tuple(rows),
    )


def _judge(recipe: Recipe, judge: Judge, pixels: Pixels, answers: dict[str, Logits]) -> Row:
    """Make one model, keep its answers and return its row."""
    row = Row(recipe=recipe.name, runs_in=recipe.runs_in, n_calibration_images=len(recipe.pixels))
    start = perf_counter()
    try:
        made = recipe.make(recipe.pixels)
    except RecipeError as err:
        return row.model_copy(update={"why_not": str(err)})
    seconds = round(perf_counter() - start, 1)
    answers[recipe.name] = _answer_of(recipe, made, pixels.shape[-1])(pixels)
    ours = OURS_TYPED if recipe.name.startswith("ModelOpt") else OURS
    against = None
    if not recipe.name.startswith("ours"):
        against = judge.against(ours, answers[ours], answers[recipe.name])
    accuracy = judge.accuracy(answers[recipe.name])
    return row.model_copy(update={"seconds": seconds, "accuracy": accuracy, "against": against})


def our_recipes(model: bytes, pixels: Pixels, draws: list[Pixels]) -> Iterator[Recipe]:
    """Yield ours, ours with one step taken away, and ours on draws of as few images as are allowed."""
    single = onnx.load_from_string(model)
    fp32 = _ort_answer(model, pixels.shape[-1])
    calibrated: dict[str, Calibrated] = {}

    def for_cpu(images: Pixels) -> Calibrated:
        # Seen once for all that take a step away.
        if "cpu" not in calibrated:
            calibrated["cpu"] = calibrate(single, "cpu", images)
        return calibrated["cpu"]

    def finished(prepared: Prepared, images: Pixels) -> bytes:
        content: bytes = correct_head_bias(prepared.build(), fp32(images), images).SerializeToString()
        return content

    def typed(images: Pixels) -> bytes:
        return finished(choose_integers(calibrate(single, "typed", images)), images)

    yield Recipe(OURS_TYPED, "ONNX Runtime", pixels, typed)
    yield Recipe(OURS, "OpenVINO", pixels, lambda images: finished(choose_integers(for_cpu(images)), images))
    yield Recipe(f"{OURS}, head bias left", "OpenVINO", pixels, lambda images: _bytes(choose_integers(for_cpu(images))))
    for words, taken_away in (
        ("weights rounded to the nearest", lambda images: choose_integers(without_gptq(for_cpu(images)))),
        ("channels not equalised", lambda images: choose_integers(without_equalising(for_cpu(images)))),
    ):
        make: Callable[[Pixels], Prepared] = taken_away
        yield Recipe(f"{OURS}, {words}", "OpenVINO", pixels, lambda images, make=make: finished(make(images), images))  # type: ignore[misc]
    for i, images in enumerate(draws, start=1):
        yield Recipe(
            f"{OURS}, {len(images)} images, draw {i}",
            "OpenVINO",
            images,
            lambda images: finished(choose_integers(calibrate(single, "cpu", images)), images),
        )


def other_recipes(model: bytes, pixels: Pixels, modelopt: Path | None) -> Iterator[Recipe]:
    """Yield everybody else's."""
    yield Recipe("ONNX Runtime, defaults", "ONNX Runtime", pixels, lambda images: ort_default(model, images))
    for method in ("MinMax", "Entropy", "Percentile"):
        yield Recipe(
            f"ONNX Runtime, convolutions per channel, {method}",
            "ONNX Runtime",
            pixels,
            lambda images, method=method: ort_convolutions(model, images, method),  # type: ignore[misc]
        )
    for preset in ("PERFORMANCE", "MIXED"):
        for is_fast, words in ((True, "fast"), (False, "full")):
            yield Recipe(
                f"NNCF {preset}, {words} bias correction",
                "OpenVINO",
                pixels,
                lambda images, preset=preset, is_fast=is_fast: nncf_int8(  # type: ignore[misc]
                    model, images, preset, has_fast_bias_correction=is_fast
                ),
            )
    if modelopt is not None:
        for method in ("max", "entropy"):
            yield Recipe(
                f"ModelOpt, {method}",
                "ONNX Runtime",
                pixels,
                lambda images, method=method: modelopt_int8(model, images, method, modelopt),  # type: ignore[misc]
            )


def markdown_table(results: Results) -> str:
    """Return the results as a table for people."""
    lines = [
        "| int8 recipe | runs in | mean AUROC change | worst finding | max \\|Δp\\| | flips | logit noise, mean (worst) "
        "| signal | our AUROC less theirs (95 %) | not inferior |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    drawn = [row for row in results.rows if ", draw " in row.recipe]
    for row in results.rows:
        if row in drawn:
            continue
        lines.append("| " + " | ".join(_cells(row)) + " |")
    if drawn:
        lines.append("| " + " | ".join(_spread(drawn)) + " |")
    lines += ["", _caption(results)]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    found, against = row.accuracy, row.against
    if found is None:
        return [row.recipe, row.runs_in, f"not measured: {row.why_not}", *[""] * 7]
    return [
        row.recipe,
        row.runs_in,
        f"{found.mean_auroc_change:+.4f}",
        "none" if found.worst_finding is None else f"{found.worst_finding} {found.worst_auroc_change:+.4f}",
        f"{found.max_abs_probability_difference:.3f}",
        f"{100 * found.flips_share:.2f} %",
        f"{100 * found.noise_mean:.1f} % ({100 * found.noise_worst:.1f} %)",
        "equal" if found.signal_db is None else f"{found.signal_db:.1f} dB",
        "" if against is None else f"{against.mean_difference:+.4f} ({against.low:+.4f} to {against.high:+.4f})",
        "" if against is None else f"{against.n_not_inferior} of {against.n_assessable}",
    ]


def _spread(drawn: Sequence[Row]) -> list[str]:
    """Return one line for all draws: from the smallest to the largest of each figure."""
    found = [row.accuracy for row in drawn if row.accuracy is not None]

    def span(values: Iterable[float | None], text: str, factor: float = 1.0) -> str:
        known = [factor * value for value in values if value is not None]
        return f"{min(known):{text}} to {max(known):{text}}" if known else "none"

    return [
        f"{drawn[0].recipe.split(', draw ')[0]}, {len(drawn)} random draws",
        drawn[0].runs_in,
        span((each.mean_auroc_change for each in found), "+.4f"),
        span((each.worst_auroc_change for each in found), "+.4f"),
        span((each.max_abs_probability_difference for each in found), ".3f"),
        span((each.flips_share for each in found), ".2f", 100.0) + " %",
        f"{span((e.noise_mean for e in found), '.1f', 100.0)} % ({span((e.noise_worst for e in found), '.1f', 100.0)} %)",
        span((each.signal_db for each in found), ".1f") + " dB",
        "",
        "",
    ]


def _caption(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    return (
        f"{results.n_test_images} test images of {results.n_test_patients} patients, {results.resize_px} px, fp32 mean AUROC "
        f"{results.fp32_mean_auroc:.3f}; {results.rows[0].n_calibration_images} calibration images of training patients, the same "
        f"for all. Worst finding: of those with {MIN_POSITIVES} positive images. Not inferior: findings for which ours loses less "
        f"than the gate's margin to this recipe, at one-sided 2.5 %. {versions}. {results.machine.processor}."
    )


def _answer_of(recipe: Recipe, made: Any, side: int) -> Answer:
    if recipe.runs_in == "ONNX Runtime":
        return _ort_answer(made, side)
    return StaticOpenvino(made, side, batch=BATCH, piece=BATCH, streams=1, threads=cores()).answer


def _ort_answer(model: bytes, side: int) -> Answer:
    session = OrtSession(model, side)
    return lambda pixels: run_in_batches(session, pixels)[0]


def _draws(dataset: DataSet) -> Iterator[tuple[str, ...]]:
    names: NDArray[np.str_] = np.array(dataset.split("train").names)
    for seed in range(N_DRAWS):
        picked = np.random.default_rng(seed).choice(len(names), MIN_IMAGES, replace=False)
        yield tuple(str(name) for name in names[np.sort(picked)])


def _modelopt_of(interpreter: str | None) -> Path | None:
    if interpreter is None:
        return None
    tool, _, path = interpreter.partition("=")
    if tool != "modelopt" or not path:
        raise typer.BadParameter(f"got --interpreter {interpreter}, needed modelopt=PYTHON")
    return Path(path)


def _bytes(prepared: Prepared) -> bytes:
    content: bytes = prepared.build().SerializeToString()
    return content


if __name__ == "__main__":
    run_program(app)
