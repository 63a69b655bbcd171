"""What TensorRT says, kept for our messages and off stdout; and TensorRT's objects made, or why they can't be."""

from collections import deque
from types import ModuleType
from typing import Any

from chexnet_deploy.errors import SessionError
from chexnet_deploy.runtime.sessions.driver import CUDA_13, name_cuda
from chexnet_deploy.runtime.sessions.trt_versions import Family

_ERRORS_KEPT = 20
_logs: dict[str, "TensorrtLog"] = {}


class TensorrtLog:
    """One for each TensorRT in the process, which must outlive all that is made with it; get it by `of`.

    Attributes:
        handle: the ILogger to give to TensorRT.
        errors: the latest, oldest first.
        warnings: between `begin` and `end`: a session runs for months and reads none.
        lines: of every severity between them, if it was told to keep them.
    """

    def __init__(self, trt: ModuleType) -> None:
        self.errors: deque[str] = deque(maxlen=_ERRORS_KEPT)
        self.warnings: list[str] = []
        self.lines: list[str] = []
        self._keeps_warnings = self._keeps_lines = False
        self.handle = _make_logger(trt, self)

    @classmethod
    def of(cls, trt: ModuleType) -> "TensorrtLog":
        """Return this TensorRT's log."""
        if trt.__name__ not in _logs:
            _logs[trt.__name__] = cls(trt)
        return _logs[trt.__name__]

    def begin(self, *, keeps_lines: bool) -> None:
        """Forget what was said. A build says 10,000 lines and more, so they are kept only for whom they are the layer table."""
        self.errors.clear()
        self.warnings, self.lines = [], []
        self._keeps_warnings, self._keeps_lines = True, keeps_lines

    def end(self) -> None:
        """Drop both, and keep no more."""
        self.warnings, self.lines = [], []
        self._keeps_warnings = self._keeps_lines = False

    def last_error(self) -> str:
        """Return ": " and the last error, once; or nothing."""
        return f": {self.errors.pop()}" if self.errors else ""

    def take(self, severity: str, message: str) -> None:
        """Keep one message.

        Args:
            severity: as TensorRT names it.
            message: one or more lines.
        """
        if self._keeps_lines:
            self.lines.extend(message.splitlines())
        if severity == "WARNING" and self._keeps_warnings:
            self.warnings.append(message.strip())
        elif severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message.strip())


def create(kind: Any, trt: ModuleType, family: Family, cuda_version: int | None) -> Any:
    """Make a Runtime or a Builder.

    Args:
        kind: trt.Runtime or trt.Builder.
        trt: the TensorRT module.
        family: what it is.
        cuda_version: of the driver, e.g. 12040; None where none was asked.

    Raises:
        SessionError: TensorRT makes none, most often because it is for a newer driver; names what to install.
    """
    log = TensorrtLog.of(trt)
    try:
        made = kind(log.handle)
    except TypeError:  # what its bindings make of a null pointer
        made = None
    if made is None:
        raise SessionError(_does_not_start(trt, family, cuda_version, log.last_error()))
    return made


def _does_not_start(trt: ModuleType, family: Family, cuda_version: int | None, why: str) -> str:
    driver, extra = "here", "rtx" if family.is_rtx else "gpu-cu13"
    if cuda_version is not None:
        driver = f"on this driver, which supports CUDA {name_cuda(cuda_version)}"
        extra = "gpu-cu12" if cuda_version < CUDA_13 and not family.is_rtx else extra
    return (
        f"{family.backend} {trt.__version__} does not start {driver}{why}. "
        f"Install what is for it: pip install 'chexnet-deploy[{extra}]'"
    )


def _make_logger(trt: ModuleType, log: TensorrtLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]  # which module it is, is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.take(severity.name, message)

    return Logger()
