"""What a person at a terminal sees: progress, tables, one line for an error; and the exit codes of every program here.

Exit codes: 0 done, 1 a gate failed, 2 a user's mistake (one line with the next step), 3 inconclusive, or done but for
quarantined images, 70 a bug (with its traceback), 130 interrupted.
"""

import errno
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from chexnet_deploy.errors import ChexnetError, GateError, ImageError
from chexnet_deploy.phases import OnPhase

if TYPE_CHECKING:
    from chexnet_deploy.bench import BenchReport
    from chexnet_deploy.evaluation.records import Evaluation
    from chexnet_deploy.predictor import Prediction
    from chexnet_deploy.serving.triton import TritonModel

# What a full, read-only or foreign disk or a wrong path answers: the user's to mend, wherever it happens.
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
}

_INTERRUPTED = "interrupted; nothing half-written was left behind"


def run_program(program: typer.Typer) -> None:
    """Run a typer program with this project's exit codes."""
    interrupts: list[int] = []

    def on_interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        # Typer ends the process itself on usage errors (2) and on typer.Exit, and turns Ctrl-C into exit 130 here.
        program()
    except GateError as err:
        fail(f"gate failed: {err}", 1)
    except ChexnetError as err:
        fail(f"error: {err}", 2)
    except KeyboardInterrupt:
        fail(_INTERRUPTED, 130)
    except OSError as err:
        if err.errno not in _DISK_ERRORS:
            traceback.print_exc()
            sys.exit(70)
        where = f" {err.filename}" if err.filename else ""
        fail(
            f"error: could not read or write{where}: {err.strerror}. Check the path, its permissions and the space.", 2
        )
    except Exception:  # noqa: BLE001 - the last door: everything else is a bug, and its traceback is wanted
        if interrupts:  # compiled code may answer Ctrl-C with an error of its own, e.g. while it is imported
            fail(_INTERRUPTED, 130)
        traceback.print_exc()
        sys.exit(70)


@contextmanager
def cancellation() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event while TensorRT builds: its bindings swallow the exception that Ctrl-C raises."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
        if event.is_set():
            raise KeyboardInterrupt


@contextmanager
def going_on(out: Path) -> Iterator[None]:
    """Say on Ctrl-C that a table is gone on with, not begun again."""
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on with {out}", 130)


@contextmanager
def progress() -> Iterator[OnPhase]:
    """Show progress bars on standard error, so that standard output stays clean for results.

    Yields a function of the phase's name, what is done and of how much; each phase gets a bar when it is first named.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def on_phase(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield on_phase


def print_repository(path: Path, models: "Sequence[TritonModel]") -> None:
    """Print each model's versions, and what the server must bring along to answer rightly."""
    from chexnet_deploy.manifest import FLOAT16_DIALECTS

    for model in models:
        for version, bundle in model.versions.items():
            typer.echo(f"{path}  {model.name} {version}  on {model.device}  id {bundle.id[:12]}")
            if bundle.manifest.dialect in FLOAT16_DIALECTS and bundle.manifest.engine is None:
                typer.echo(
                    f"warning: {model.name} answers wrongly in a Triton with an ONNX Runtime before 1.30", err=True
                )


def print_bench(report: "BenchReport", page: Path) -> None:
    """Print the table, every reason why not PASS, and where the whole report lies."""
    from chexnet_deploy.bench import summary_rows

    print_table(summary_rows(report))
    for result in report.engines:
        for reason in result.reasons:
            typer.echo(f"{result.name}: {reason}")
    typer.echo(f"{report.verdict}  {page}")


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print the table, what is undefined, whose images these are, and one line for each further study."""
    from chexnet_deploy.evaluation import words

    shown = (
        "finding",
        "positives",
        "positive patients",
        "AUROC",
        "95 % interval",
        "AUPRC",
        "sensitivity",
        "specificity",
    )
    print_table([{k: row[k] for k in shown if k in row} for row in words.summary_rows(evaluation)])
    typer.echo(f"{words.mean_line(evaluation)}; {evaluation.data}")
    for line in (*words.undefined_lines(evaluation), *evaluation.whom, *evaluation.notes):
        typer.echo(line)
    if evaluation.readers is not None:
        typer.echo(words.readers_line(evaluation.readers))
        for study in evaluation.readers.studies:
            typer.echo(words.study_line(study))
    if evaluation.localization is not None:
        typer.echo(words.localization_line(evaluation.localization))
        print_table(words.localization_rows(evaluation.localization.summary))


def print_answers(answers: "Iterable[tuple[str, Prediction | ImageError]]", points: Mapping[str, float]) -> int:
    """Print each image's findings, the likeliest first, beside their operating points; return how many have none."""
    from chexnet_deploy.image_files import one_line

    n_quarantined = 0
    for name, answer in answers:
        typer.echo(one_line(name))
        if isinstance(answer, ImageError):
            n_quarantined += 1
            typer.echo(f"  quarantined: {one_line(str(answer))}")
            continue
        for finding, probability in sorted(answer.probabilities.items(), key=lambda item: -item[1]):
            verdict = "no operating point"
            if finding in points:
                is_there = answer.present[finding]
                verdict = f"{'>=' if is_there else '< '} {points[finding]:.4f}{'  present' if is_there else ''}"
            typer.echo(f"  {finding:20} {probability:.4f} {verdict}")
    return n_quarantined


def print_json_answers(answers: "Iterable[tuple[str, Prediction | ImageError]]", points: Mapping[str, float]) -> int:
    """Print one JSON object, an entry for each image as it comes; return how many have no findings."""
    n_quarantined, opening = 0, "{\n"
    for name, answer in answers:
        entry: dict[str, object]
        if isinstance(answer, ImageError):
            n_quarantined += 1
            entry = {"quarantined": str(answer)}
        else:
            entry = {"probabilities": answer.probabilities, "present": answer.present}
        typer.echo(opening + json.dumps({name: entry}, indent=2)[2:-2], nl=False)
        opening = ",\n"
    typer.echo("\n}")
    return n_quarantined


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows as an aligned table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_json(value: object) -> None:
    """Print for programs."""
    typer.echo(json.dumps(value, indent=2))


def fail(message: str, code: int) -> NoReturn:
    """End the process with one line."""
    print(message, file=sys.stderr)  # noqa: T201 - the command line's one way to complain
    sys.exit(code)
