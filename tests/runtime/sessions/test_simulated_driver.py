"""The real session code over a simulated driver and a stand-in for TensorRT: ownership, failures, versions.

Each scenario of simulated/scenarios.py runs in a process of its own, for each binding that is installed. No speed, accuracy
or layer table comes from here.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SIMULATED = Path(__file__).parent / "simulated"
CHECKOUT = Path(__file__).parents[3]
BINDINGS = {"cuda-bindings": "cuda", "pycuda": "pycuda"}
# Scenarios about one version or machine; all others run on TensorRT 10 and on an ordinary one.
ENVIRONMENT: dict[str, dict[str, str]] = {
    "tensorrt_for_another_driver": {"SIM_NO_RUNTIME": "1", "SIM_CUDA_VERSION": "12040"},
    "a_plan_that_cannot_be_captured": {"SIM_TENSORRT": "1.7.1", "SIM_NOT_CAPTURABLE": "1"},
    "legacy_stream_works_while_graphs_are_captured": {"SIM_LEGACY_WORK": "1"},
    "profiles_not_shared": {"SIM_TENSORRT": "8.6.0"},
    "integrated_gpu_copies_nothing": {"SIM_INTEGRATED": "1"},
    "smallest_batch_is_eight": {"SIM_PROFILE": "8,8,16"},
}
# A free that fails is lost with the process.
LOSE_MEMORY = ("each_call_fails_in_turn", "the_gpu_fails_for_good")
# All that a session imports, and what that imports.
BARE = (
    "numpy",
    "PIL",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "typing_inspection",
    "cuda",
)
VERSIONS = {"8.6.0": {"SIM_SHARES_PROFILES": "1"}, "11.4.0.106": {}, "1.7.1": {}}


def scenarios() -> list[str]:
    tree = ast.parse((SIMULATED / "scenarios.py").read_text())
    helpers = {"new", "alive", "refusal", "check_balance"}
    functions = (node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    return [name for name in functions if name not in helpers and not name.startswith("_")]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the simulated libcuda.so.1; CHEXNET_SIMULATED_DRIVER names one compiled beforehand."""
    if "CHEXNET_SIMULATED_DRIVER" in os.environ:
        return Path(os.environ["CHEXNET_SIMULATED_DRIVER"])
    if shutil.which("gcc") is None:
        pytest.skip("NOT RUN over the simulated driver: it needs gcc")
    folder = tmp_path_factory.mktemp("simulated")
    library = folder / "libcuda.so.1"
    sources = [SIMULATED / "libcuda.c", *_stubs(folder)]
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, *sources, "-lpthread", "-ldl"]
    subprocess.run(["gcc", *map(str, flags)], check=True)
    return folder


def _stubs(folder: Path) -> list[Path]:
    """pycuda links more of the driver than a session calls; what is not simulated answers that it isn't supported."""
    spec = importlib.util.find_spec("pycuda")
    if spec is None or spec.submodule_search_locations is None:
        return []
    (extension,) = Path(spec.submodule_search_locations[0]).glob("_driver*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", extension], capture_output=True, text=True, check=True)
    wanted = set(re.findall(r"\bU (cu[A-Z]\w*)", symbols.stdout))
    simulated = set(re.findall(r"^int (cu\w+)\(", (SIMULATED / "libcuda.c").read_text(), re.MULTILINE))
    stubs = folder / "stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 801; }}\n" for name in sorted(wanted - simulated)))
    return [stubs]


def run(
    libraries: Path, binding: str, scenario: str, options: Sequence[str] = ("-W", "error"), **environment: str
) -> None:
    if importlib.util.find_spec(BINDINGS[binding]) is None:
        pytest.skip(f"NOT RUN with {binding}: it is not installed")
    done = subprocess.run(
        [sys.executable, *options, str(SIMULATED / "scenarios.py"), binding, scenario],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": os.pathsep.join((str(CHECKOUT), str(SIMULATED), os.environ.get("PYTHONPATH", ""))),
            "SIM_REPORT": "1",
            **ENVIRONMENT.get(scenario, {}),
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # nothing of TensorRT's log
    ending = done.stderr.strip().splitlines()[-1:]
    if scenario in LOSE_MEMORY:
        return
    assert ending == ["at exit: 0 references, 0 device, 0 host, 0 stream, 0 event, 0 graph, 0 graph exec"], done.stderr


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("scenario", scenarios())
def test_a_session(libraries: Path, binding: str, scenario: str) -> None:
    run(libraries, binding, scenario)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_of_another_version(libraries: Path, version: str) -> None:
    run(libraries, "cuda-bindings", "life_of_a_session", SIM_TENSORRT=version, **VERSIONS[version])


def test_a_bare_clone(libraries: Path, tmp_path: Path) -> None:
    """cuda-bindings alone: no pycuda, no compiler on PATH, this package not installed."""
    for name in BARE:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        source = Path((spec.submodule_search_locations or [spec.origin or ""])[0])
        (tmp_path / source.name).symlink_to(source)
        libs = source.parent / f"{name.lower().replace('pil', 'pillow')}.libs"  # what its wheel brings along
        if libs.is_dir():
            (tmp_path / libs.name).symlink_to(libs)
    paths = os.pathsep.join(map(str, (tmp_path, CHECKOUT, SIMULATED)))
    run(libraries, "cuda-bindings", "life_of_a_session", ("-S", "-W", "error"), PYTHONPATH=paths, PATH="")


@pytest.mark.parametrize(("cuda", "extra"), [("12040", "gpu-cu12"), ("13000", "gpu-cu13")])
def test_doctor_asks_the_driver_and_names_the_one_line_that_is_missing(
    libraries: Path, tmp_path: Path, cuda: str, extra: str
) -> None:
    code = (
        "import sys; sys.modules['pycuda'] = None; from chexnet_deploy.cli import inspect; "
        "inspect._version = {'cuda-bindings': '13.0'}.get; inspect.find_spec = lambda name: None; "
        "ability = inspect._tensorrt(); print(ability.found, '|', ability.next_step)"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "SIM_CUDA_VERSION": cuda}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True
    )
    found, step = done.stdout.strip().split(" | ")
    assert found == f"Simulated GPU (driver for CUDA {cuda[:2]}.{cuda[3]}, by cuda-bindings), cuda-bindings 13.0"
    assert step == f"needs pip install 'chexnet-deploy[{extra}]'"
