"""What a person at a terminal sees: progress, tables, one line for an error; and the exit codes of every program here.

Exit codes: 0 done, 1 a gate failed, 2 a user's mistake (one line with the next step), 3 inconclusive, or done but for
quarantined images, 70 a bug (with its traceback), 130 interrupted, 141 nobody reads on, as after `| head`.
"""

import errno
import io
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import NoReturn

import typer

from chexnet_deploy.errors import ChexnetError, GateError, OnPhase

# What a full, read-only or foreign disk or a wrong path answers: the user's to mend, wherever it happens.
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP),
}

_LINE_EVERY_S = 60.0  # of progress that goes into a log
_INTERRUPTED = "interrupted; nothing half-written was left behind"


def run_program(program: typer.Typer) -> None:
    """Run a typer program with this project's exit codes."""
    interrupts: list[int] = []

    def on_interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name is shown, if not as it is, where a terminal can't
    try:
        # Typer ends the process itself on usage errors (2) and on typer.Exit, and turns Ctrl-C into exit 130 here.
        program()
    except GateError as err:
        fail(f"gate failed: {err}", 1)
    except ChexnetError as err:
        fail(f"error: {err}", 2)
    except KeyboardInterrupt:
        fail(_INTERRUPTED, 130)
    except (SystemExit, BrokenPipeError) as err:
        # Typer makes exit 1 of a pipe that nobody reads, which here means that a gate failed.
        if isinstance(err, SystemExit) and not isinstance(err.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is buffered still has to go somewhere
        sys.exit(141)
    except OSError as err:
        if err.errno not in _DISK_ERRORS:
            traceback.print_exc()
            sys.exit(70)
        where = f" {err.filename}" if err.filename else ""
        fail(
            f"error: could not read or write{where}: {err.strerror}. Check the path, its permissions and the space.", 2
        )
    except Exception:  # noqa: BLE001 - everything else is a bug, and its traceback is wanted
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
    """Show progress on standard error, so that standard output stays clean for results.

    Yields a function of the phase's name, what is done and of how much. Each phase gets a bar when it is first named; where
    nobody watches, as under nohup, it gets a line when it begins, one a minute and one when it is done.
    """
    if not sys.stderr.isatty():
        yield _phase_lines()
        return
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


def _phase_lines() -> OnPhase:
    @dataclass(slots=True)
    class Phase:
        began_s: float
        done_before: int
        said_s: float = -math.inf
        is_done: bool = False

    phases: dict[str, Phase] = {}

    def on_phase(phase: str, done: int, total: int) -> None:
        now_s = monotonic()
        known = phases.setdefault(phase, Phase(now_s, done))
        just_done = done >= total and not known.is_done
        if not just_done and now_s - known.said_s < _LINE_EVERY_S:
            return
        known.said_s, known.is_done = now_s, done >= total
        passed_s, n_new = now_s - known.began_s, done - known.done_before
        line = f"{phase}: {done:,} of {total:,}, {timedelta(seconds=round(passed_s))} passed"
        if n_new > 0 and done < total:
            line += f", {timedelta(seconds=round(passed_s / n_new * (total - done)))} left"
        typer.echo(line, err=True)

    return on_phase


def print_table(rows: list[dict[str, str]]) -> None:
    """Print rows as an aligned table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_json(value: object) -> None:
    """Print for programs, in ASCII: escapes of a terminal that can't show a name would be no JSON."""
    typer.echo(json.dumps(value, indent=2))


def fail(message: str, code: int) -> NoReturn:
    """End the process with one line."""
    print(message, file=sys.stderr)  # noqa: T201 - the command line's one way to complain
    sys.exit(code)
