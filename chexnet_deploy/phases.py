"""How long work says where it is: no progress bar below the command line, one signature for all who are told."""

from collections.abc import Callable
from typing import TypeAlias

OnPhase: TypeAlias = Callable[[str, int, int], None]
"""Called with the phase's name, what is done and of how much; a phase begins when it is first named."""
