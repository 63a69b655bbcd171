"""Every error this package raises on purpose.

    ChexnetError              a user can mend it; the command line prints one line and exits 2
    ├── BundleError           a bundle is damaged, edited, incomplete or can't be written
    ├── CalibrationError      a calibration set is too small, repeated, constant or overlaps the evaluation set
    ├── CheckpointError       weights can't be loaded, or don't fit the model
    ├── DatasetError          a data set's tables or images contradict each other
    ├── ExportError           an exported graph doesn't answer as the model it came from
    ├── GateError             a parity gate failed; the command line exits 1
    ├── ImageError            an image file can't be read without guessing
    ├── MetricError           a statistic is undefined on this data
    ├── MissingPackageError   an optional package is needed; the message names the extra to install
    ├── SessionError          a backend refused a model or its input
    ├── SpecError             an engine spec or a recipe is wrong
    └── TableError            a table of findings is of another run, was changed, or can't be written

A message says what was found, what was needed, and the next step. Errors of other libraries are translated at the
door of the room that uses them, `from err`. Anything else that escapes is a bug: the command line exits 70.
"""


class ChexnetError(Exception):
    """Something a user can mend."""


class BundleError(ChexnetError):
    """A bundle is damaged, edited, incomplete or can't be written."""


class CalibrationError(ChexnetError):
    """A calibration set is too small, repeated, constant or overlaps the evaluation set."""


class CheckpointError(ChexnetError):
    """Weights can't be loaded, or don't fit the model."""


class DatasetError(ChexnetError):
    """A data set's tables or images contradict each other."""


class ExportError(ChexnetError):
    """An exported graph doesn't answer as the model it came from."""


class GateError(ChexnetError):
    """A parity gate failed."""


class ImageError(ChexnetError):
    """An image file can't be read without guessing."""


class MetricError(ChexnetError):
    """A statistic is undefined on this data."""


class MissingPackageError(ChexnetError):
    """An optional package is needed; the message names the extra to install."""


class SessionError(ChexnetError):
    """A backend refused a model or its input."""


class SpecError(ChexnetError):
    """An engine spec or a recipe is wrong."""


class TableError(ChexnetError):
    """A table of findings is of another run, was changed, or can't be written."""
