"""examples/embed_c, built by the machine's C compiler against the libraries of Python's own packages, and called by ctypes.

So the C runtime and the Python runtime stand on the same backend library, and can be held against each other bit for bit.
"""

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_size_t, c_uint8, c_void_p
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import CHECKOUT
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.errors import BundleError, ChexnetError, ImageError, SessionError, TrustError
from chexnet_deploy.images import Gray

FOLDER: Final = CHECKOUT / "examples" / "embed_c"
FLAGS: Final = ("-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wno-missing-field-initializers", "-Werror")
SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
ERRORS: Final[Sequence[type[ChexnetError]]] = (BundleError, TrustError, SessionError, ImageError)
"""What status 1, 2, 3 and 4 stand for."""

Library: TypeAlias = Literal["openvino", "onnxruntime"]


class NotBuiltError(Exception):
    """A compiler, a header or a library is missing; the message says which."""


def find_libraries() -> dict[Library, Path]:
    """Return the libraries of the installed packages that the C file can be linked with."""
    found: dict[Library, Path] = {}
    patterns: dict[Library, str] = {"openvino": "libs/libopenvino_c.so.*", "onnxruntime": "capi/libonnxruntime.so.*"}
    for name, pattern in patterns.items():
        spec = importlib.util.find_spec(name)
        files = sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []
        if files:
            found[name] = files[0]
    return found


def build(out: Path, *libraries: Library, source: Path | None = None, sanitize: bool = False) -> Path:
    """Compile and link; warnings are errors.

    Args:
        out: the file to write; symbolic links that the linker needs go beside it.
        libraries: backends to build in.
        source: a program's own file, C or C++; None for a shared library.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at the first fault.

    Raises:
        NotBuiltError: what is needed is missing.
        RuntimeError: it doesn't compile.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotBuiltError("there is no C compiler here")
    present = find_libraries()
    flags, links = [*FLAGS, *(SANITIZERS if sanitize else ())], ["-lcrypto", "-lz", "-lm"]
    for name in libraries:
        if name not in present:
            raise NotBuiltError(f"Python's package {name} has no C library here")
        flags += [f"-DCHEXNET_{name.upper()}", f"-I{present[name].parent.parent / 'include'}"]
        soname = out.parent / ".".join(present[name].name.split(".")[:3])  # the name that the loader asks for
        if not soname.is_symlink():
            soname.symlink_to(present[name])
        links += [str(soname), f"-Wl,-rpath,{present[name].parent}:{out.parent}"]
    objects = out.with_suffix(".o")
    steps = [[compiler, *flags, "-fPIC", "-c", str(FOLDER / "chexnet.c"), "-o", str(objects)]]
    if source is None:
        steps.append([compiler, *flags, "-shared", str(objects), "-o", str(out), *links])
    elif source.suffix == ".c":
        steps.append([compiler, *flags, f"-I{FOLDER}", str(source), str(objects), "-o", str(out), *links])
    else:
        plus = [flag for flag in flags if flag != "-std=c11"]
        steps.append(["c++", "-std=c++17", *plus, f"-I{FOLDER}", str(source), str(objects), "-o", str(out), *links])
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True)
        except OSError as err:
            raise NotBuiltError(f"{step[0]} can't be run: {err}") from err
        if "No such file" in done.stderr or "cannot find" in done.stderr:
            raise NotBuiltError(
                next(line for line in done.stderr.splitlines() if "No such" in line or "cannot" in line)
            )
        if done.returncode:
            raise RuntimeError(done.stderr)
    return out


class _Model(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_char * 65),
        ("side_px", c_int),
        ("n_findings", c_int),
        ("findings", POINTER(c_char_p)),
        ("operating_points", POINTER(c_double)),
        ("dialect", c_char_p),
    )


class _Answer(ctypes.Structure):
    _fields_ = (
        ("logits", POINTER(c_float)),
        ("probabilities", POINTER(c_float)),
        ("present", POINTER(ctypes.c_byte)),
        ("maps", POINTER(c_float)),
    )


class _Key(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("public_key", c_char_p), ("is_revoked", c_int))


class _Trust(ctypes.Structure):
    _fields_ = (
        ("keys", POINTER(_Key)),
        ("n_keys", c_int),
        ("line", c_char_p),
        ("min_release", c_int32),
        ("floor_file", c_char_p),
    )


_OPEN = ctypes.CFUNCTYPE(c_int, POINTER(_Model), c_void_p, c_size_t, c_int, POINTER(c_void_p), c_void_p)
_RUN = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(c_uint8), POINTER(c_float), POINTER(c_float), c_void_p)
_CLOSE = ctypes.CFUNCTYPE(None, c_void_p)


class _Backend(ctypes.Structure):
    _fields_ = (("file", c_char_p), ("open", _OPEN), ("run", _RUN), ("close", _CLOSE))


class Answer(NamedTuple):
    """What the C runtime says of one picture.

    Attributes:
        logits: float32 [C].
        probabilities: float32 [C].
        present: [C]: 1, 0, or -1 where a finding has no operating point.
        maps: float32 [C, S/32, S/32].
    """

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    present: tuple[int, ...]
    maps: NDArray[np.float32]


class Spy:
    """A backend that counts the bytes it is given and then refuses them.

    Attributes:
        n_bytes: so far.
    """

    def __init__(self, file: str) -> None:
        self.n_bytes = 0
        free = ctypes.CDLL(None).free

        def take(model: Any, content: int, n_bytes: int, threads: int, session: Any, message: int) -> int:
            self.n_bytes += n_bytes
            free(c_void_p(content))
            return 1

        self.table = _Backend(file.encode(), _OPEN(take), _RUN(lambda *_: 1), _CLOSE(lambda _: None))


class EmbeddedC:
    """The shared library.

    Args:
        path: as `build` wrote it.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.chexnet_get_model.restype = POINTER(_Model)

    def resize(self, gray: Gray, side_px: int) -> NDArray[np.uint8]:
        """Return uint8 [side_px, side_px].

        Raises:
            ImageError: as the C function refuses.
        """
        out = np.empty((side_px, side_px), np.uint8)
        gray = np.ascontiguousarray(gray)
        self._call("chexnet_resize", gray.ctypes.data_as(c_void_p), *gray.shape, side_px, out.ctypes.data_as(c_void_p))
        return out

    @contextmanager
    def open(
        self, path: Path, backend: Library | Spy, *, trust: Trust | None = None, threads: int = 0
    ) -> Iterator["OpenBundle"]:
        """Yield an open bundle.

        Raises:
            ChexnetError: the one of ERRORS that the status stands for.
        """
        bundle = c_void_p()
        table = backend.table if isinstance(backend, Spy) else _Backend.in_dll(self._library, f"chexnet_{backend}")
        asked = None if trust is None else ctypes.byref(_as_c(trust))
        self._call("chexnet_open", bytes(path), asked, ctypes.byref(table), threads, ctypes.byref(bundle))
        try:
            yield OpenBundle(self, bundle)
        finally:
            self._library.chexnet_close(bundle)

    def _call(self, name: str, *arguments: Any) -> None:
        message = ctypes.create_string_buffer(512)
        status = self._library[name](*arguments, message)
        if status:
            raise ERRORS[status - 1](message.value.decode(errors="replace"))


class OpenBundle:
    """A bundle that the C runtime holds open."""

    def __init__(self, library: EmbeddedC, bundle: c_void_p) -> None:
        self._library, self._bundle = library, bundle
        model: Any = library._library.chexnet_get_model(bundle).contents
        self.id: str = model.id.decode()
        self.side_px: int = model.side_px
        self.findings = tuple(name.decode() for name in model.findings[: model.n_findings])

    def predict(self, gray: Gray) -> Answer:
        """Return what the C runtime says of uint8 [H, W].

        Raises:
            ImageError, SessionError: as the C function refuses.
        """
        answer, c, cells = _Answer(), len(self.findings), self.side_px // 32
        gray = np.ascontiguousarray(gray)
        self._library._call(
            "chexnet_predict", self._bundle, gray.ctypes.data_as(c_void_p), *gray.shape, ctypes.byref(answer)
        )
        as_array = np.ctypeslib.as_array
        return Answer(
            as_array(answer.logits, (c,)).copy(),
            as_array(answer.probabilities, (c,)).copy(),
            tuple(answer.present[:c]),
            as_array(answer.maps, (c, cells, cells)).copy(),
        )


def _as_c(trust: Trust) -> _Trust:
    keys = [_Key(key.name.encode(), key.public_key.encode(), key.is_revoked) for key in trust.keys]
    floor = None if trust.floor_file is None else bytes(trust.floor_file)
    line = None if trust.line is None else trust.line.encode()
    return _Trust((_Key * len(keys))(*keys), len(keys), line, trust.min_release or 0, floor)
