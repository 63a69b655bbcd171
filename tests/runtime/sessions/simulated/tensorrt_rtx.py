"""The stand-in under the other name; SIM_TENSORRT says that it is RTX."""

from tensorrt import *  # noqa: F403
from tensorrt import __version__  # noqa: F401
