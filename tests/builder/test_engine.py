"""What can be refused before a GPU is touched. Building and running on one: tests marked gpu."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chexnet_deploy.builder.compile import Compiled
from chexnet_deploy.builder.engine import (
    build_engine,
    one_builder,
    refuse_dropped_precision,
    refuse_other_dialect,
    refuse_other_gpu,
)
from chexnet_deploy.builder.timing_cache import cache_key, read_cache, write_cache
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.errors import BundleError, ExportError, MissingPackageError, SessionError, SpecError
from chexnet_deploy.manifest import Target
from chexnet_deploy.sessions.target import refuse_other_target
from chexnet_deploy.sessions.tensorrt_versions import family_of
from chexnet_deploy.spec import read_spec, spec_names

HERE = Target(
    gpu="NVIDIA L4",
    compute_capability="8.9",
    backend="tensorrt",
    tensorrt="10.3.0",
    driver="12.4",
    platform="Linux x86_64",
)


def compiled(conv_types: dict[str, str]) -> Compiled:
    return Compiled(plan=b"", layers=(), timing_cache=b"", conv_types=conv_types, build_s=0.0, warnings=())


def test_the_same_machine_and_a_newer_driver_are_taken() -> None:
    refuse_other_target(HERE, HERE, "x")
    refuse_other_target(HERE, HERE.model_copy(update={"driver": "12.10"}), "x")  # 12.10 is newer than 12.4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu", "NVIDIA T4"),
        ("compute_capability", "7.5"),
        ("backend", "tensorrt_rtx"),
        ("tensorrt", "10.8.0"),
        ("driver", "12.3"),
        ("platform", "Linux aarch64"),
    ],
)
def test_another_machine_is_refused_with_both_named(field: str, value: str) -> None:
    with pytest.raises(SessionError, match="do not move between machines") as caught:
        refuse_other_target(HERE, HERE.model_copy(update={field: value}), "plans/int8")
    for word in (getattr(HERE, field), value, "plans/int8"):
        assert word in str(caught.value)


def test_each_tensorrt_takes_its_own_dialect(bundles: dict[str, Bundle]) -> None:
    for version in ("10.3.0", "11.0.0"):
        refuse_other_dialect(bundles["int8"], family_of("tensorrt", version))
    with pytest.raises(BundleError, match="--dialect trt8"):
        refuse_other_dialect(bundles["int8"], family_of("tensorrt", "8.6.0"))
    refuse_other_dialect(bundles["fp16"], family_of("tensorrt", "8.6.0"))


def test_a_gpus_spec_is_for_that_gpu() -> None:
    refuse_other_gpu(read_spec("l4-int8"), HERE)
    refuse_other_gpu(read_spec("int8"), HERE)
    with pytest.raises(SpecError, match=r"H200, here is NVIDIA L4"):
        refuse_other_gpu(read_spec("h200-int8"), HERE)


def test_specs_never_measured_promise_no_speed() -> None:
    for name in spec_names():
        spec = read_spec(name)
        assert spec.gate.latency == ("not gated" if spec.gpu is None else "unproven"), name


def test_a_convolution_that_fell_back_is_named(bundles: dict[str, Bundle]) -> None:
    manifest = bundles["int8"].manifest
    types = {"/features/conv0/Conv": "float16", "/a/Conv": "int8", "/b/Conv": "int8", "/Conv": "float32"}
    refuse_dropped_precision(manifest, compiled(types))
    with pytest.raises(ExportError, match=r"1 convolutions do not run in int8, e\.g\. /b/Conv in float32"):
        refuse_dropped_precision(manifest, compiled({**types, "/b/Conv": "float32"}))


def test_wrong_requests_are_refused_before_a_gpu_is_looked_for(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Give its own spec"):
        build_engine(bundles["fp16"], read_spec("int8"), tmp_path / "out")
    with pytest.raises(BundleError, match="there already"):
        build_engine(bundles["fp16"], read_spec("fp16"), tmp_path)


def test_two_builders_of_one_place_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def build(name: str) -> None:
        with one_builder(tmp_path / "plans" / "int8"):
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, "ab"))
    assert order in (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])


SHA256 = "0" * 64


def test_a_timing_cache_comes_back_for_the_same_build_only(tmp_path: Path) -> None:
    path, spec = tmp_path / "cache", read_spec("int8")
    key = cache_key(SHA256, HERE, spec)
    assert read_cache(path, key) == (b"", None)
    write_cache(path, key, b"timings\nwith a line break")
    assert read_cache(path, key) == (b"timings\nwith a line break", None)
    others = (
        cache_key("1" * 64, HERE, spec),
        cache_key(SHA256, HERE.model_copy(update={"driver": "12.5"}), spec),
        cache_key(SHA256, HERE, read_spec("fp16")),
    )
    for other in others:
        content, message = read_cache(path, other)
        assert (content, message is not None and "another model" in message) == (b"", True)


@pytest.mark.parametrize("damage", [b"", b"no JSON", b"[]\nx", b"{}\nx"])
def test_a_damaged_timing_cache_is_left_aside(tmp_path: Path, damage: bytes) -> None:
    path, key = tmp_path / "cache", cache_key(SHA256, HERE, read_spec("int8"))
    write_cache(path, key, b"timings")
    whole = path.read_bytes()
    for content in (damage, whole[:-1]):
        path.write_bytes(content)
        got, message = read_cache(path, key)
        assert got == b""
        assert message is not None
        assert "was not used" in message


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises((SessionError, MissingPackageError), match=r"pycuda|driver|GPU"):
        build_engine(bundles["fp16"], read_spec("fp16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="there is a GPU here")
def test_export_engine_looks_for_the_gpu_before_it_works(checkpoint_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chexnet_deploy", "export", str(checkpoint_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--engine"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
