"""Everything from one checkpoint, on real radiographs, by the commands that a user would type; each is printed before it runs.

    python -m benchmarks.cpu.real CHECKPOINT --data ROOT --out FOLDER [--before CHECKPOINT] [--readers LABELS]
    python -m benchmarks.cpu.real --table

FOLDER gets the bundles, the reports of bench and evaluate, and planted.json; results/real-cpu.json.gz what the table is made of.
Test patients are for the final measurement only: thresholds come from validation patients, calibration images from the rest.
"""

import gzip
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from benchmarks.common import COMMAND, RESULTS, checkout_environment
from chexnet_deploy.evaluation.bench_report import BenchReport, summary_rows
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.terminal import run_program

OUT = RESULTS / "real-cpu.json.gz"
FORMS = "typed,mixed,trt8,cpu"
_IS_DONE, _IS_NO_PASS = (
    (0,),
    (0, 1, 3),
)  # exit codes: bench says FAIL and INCONCLUSIVE by them, and has its figures all the same

app = typer.Typer(add_completion=False)


@app.command()
def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A .safetensors file.")] = None,
    data: Annotated[Path | None, typer.Option(help="ChestX-ray14.", envvar="CHEXNET_CHESTXRAY14")] = None,
    out: Annotated[Path, typer.Option(help="New folder.")] = Path("real"),
    before: Annotated[Path | None, typer.Option(help="An earlier checkpoint, to say what this one gained.")] = None,
    readers: Annotated[Path | None, typer.Option(help="Folder of expert labels: compare with radiologists.")] = None,
    images: Annotated[Path | None, typer.Option(help="Only the test images this list names.")] = None,
    calibration_images: Annotated[int, typer.Option(help="For int8.")] = 256,
    forms: Annotated[str, typer.Option(help="Of int8.")] = FORMS,
    table: Annotated[bool, typer.Option(help="Print the table of the committed results and stop.")] = False,
) -> None:
    """Export, prove and evaluate one checkpoint."""
    if table:
        typer.echo(markdown_table(read_results()))
        return
    if checkpoint is None or data is None:
        raise typer.BadParameter("give a checkpoint, and ChestX-ray14 by --data or CHEXNET_CHESTXRAY14")
    results = run_all(
        checkpoint,
        data,
        out,
        before=before,
        readers=readers,
        images=images,
        n_calibration=calibration_images,
        forms=forms,
    )
    OUT.write_bytes(gzip.compress(json.dumps(results).encode(), mtime=0))
    typer.echo(markdown_table(results))
    planted = out / "planted.json"
    run(sys.executable, "-m", "benchmarks.int8.planted", out / "bundles", "--data", data, "--out", planted)


def run_all(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    before: Path | None,
    readers: Path | None,
    images: Path | None,
    n_calibration: int,
    forms: str,
) -> dict[str, Any]:
    """Run every command and return what the reports say."""
    bundles, only = out / "bundles", [] if images is None else ["--images", images]
    export: tuple[object, ...] = ("export", checkpoint, "--out", bundles, "--data", data)
    export += ("--precision", "fp32,fp16,int8", "--dialect", forms, "--calibration-images", n_calibration)
    chexnet(*export)
    engines = [word for path in sorted(bundles.glob("*/manifest.json")) for word in ("--engine", path.parent)]
    chexnet("bench", *engines, "--data", data, *only, "--out", out / "bench", is_right=_IS_NO_PASS)
    experts = [] if readers is None else ["--readers", readers]
    evaluated = out / "evaluation"
    chexnet("evaluate", bundles / "fp32", "--data", data, *only, *experts, "--out", evaluated)
    gained = None
    if before is not None:
        chexnet("export", before, "--out", out / "before", "--precision", "fp32")
        both = ("--engine", bundles / "fp32", "--reference", out / "before" / "fp32", "--spec", "fp32")
        chexnet("bench", *both, "--data", data, *only, "--out", out / "gained", is_right=_IS_NO_PASS)
        gained = _report(out / "gained")
    return {"bench": _report(out / "bench"), "evaluation": _report(evaluated), "gained": gained}


def chexnet(*words: object, is_right: tuple[int, ...] = _IS_DONE) -> None:
    """Run one command of the command line."""
    run(*COMMAND, *words, is_right=is_right)


def run(*words: object, is_right: tuple[int, ...] = _IS_DONE) -> None:
    """Print a command and run it; end with its exit code where that is none of the right ones."""
    command = [str(word) for word in words]
    typer.echo(f"$ {shlex.join(command)}")
    code = subprocess.run(command, env=checkout_environment(), check=False).returncode
    if code not in is_right:
        raise typer.Exit(code)


def _report(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def read_results() -> dict[str, Any]:
    """Return the committed results."""
    results: dict[str, Any] = json.loads(gzip.decompress(OUT.read_bytes()))
    return results


def markdown_table(results: Mapping[str, Any]) -> str:
    """Return the README's table of results."""
    report, evaluation = _read(BenchReport, results["bench"]), _read(Evaluation, results["evaluation"])
    rows = []
    for engine, row in zip(report.engines, summary_rows(report), strict=True):
        assert engine.parity is not None  # there are images
        noise = [finding.noise_share for finding in engine.parity.findings if finding.noise_share is not None]
        rows.append({**row, "logit noise": f"{100 * mean(noise):.2f} %"})
    lines = ["| " + " | ".join(name.replace("|", "\\|") for name in rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    assert evaluation.mean_auroc is not None
    lines += ["", f"{report.data}. fp32: mean AUROC {evaluation.mean_auroc:.4f}"]
    if evaluation.mean_auroc_interval is not None:  # few images have none
        low, high = evaluation.mean_auroc_interval
        lines[-1] += f" ({low:.4f} to {high:.4f})"
    if results["gained"] is not None:
        (engine,) = _read(BenchReport, results["gained"]).engines
        assert engine.parity is not None
        old, new = engine.parity.mean_auroc_reference, engine.parity.mean_auroc_candidate
        low, high = engine.parity.mean_difference_low, engine.parity.mean_difference_high
        lines[-1] += f"; before it {old:.4f}, a paired gain of {new - old:+.4f} ({low:+.4f} to {high:+.4f})"
    lines[-1] += f". {report.machine.processor}, {report.machine.cores} cores."
    return "\n".join(lines)


def _read(kind: Any, content: object) -> Any:
    return kind.model_validate_json(json.dumps(content))


if __name__ == "__main__":
    run_program(app)
