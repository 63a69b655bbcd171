"""What the running node says on standard error: one line of JSON for each event, codes and numbers only."""

import json
import logging
import sys
import threading
import time
import warnings
from typing import TextIO

from pynetdicom import _config


class Journal:
    """Lines for the operator. The audit log is for decisions; this is for what happens around them.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def say(self, event: str, **fields: str | int | float | None) -> None:
        """Write one line."""
        line = json.dumps({"utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **fields})
        with self._lock:
            print(line, file=self._stream, flush=True)


def silence_libraries(journal: Journal) -> None:
    """Keep what libraries say from every output: they quote identifiers, values and whole requests.

    An exception that ends a thread is reported by its type alone.
    """
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = _config.LOG_RESPONSE_IDENTIFIERS = False
    for name in ("pynetdicom", "pydicom", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
        logger.disabled = True
        for child in [each for each in logging.Logger.manager.loggerDict if each.startswith(f"{name}.")]:
            logging.getLogger(child).disabled = True
    warnings.simplefilter("ignore")

    def report(arguments: threading.ExceptHookArgs) -> None:
        journal.say("thread-ended", error=arguments.exc_type.__name__)

    threading.excepthook = report
    sys.unraisablehook = lambda arguments: journal.say("unraisable", error=arguments.exc_type.__name__)
