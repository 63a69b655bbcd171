"""What can be refused before a GPU is touched. Building and running on one: tests marked gpu."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.gpu.propose import propose
from benchmarks.rigs.plan_card import CARD, TARGET
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import MANIFEST, PLAN_MODEL, PROBE, Manifest
from chexnet_deploy.errors import BundleError, ExportError, MissingPackageError, SessionError, SpecError
from chexnet_deploy.evaluation.spec import read_spec, spec_names
from chexnet_deploy.export.tensorrt.build import (
    build_tensorrt_plan,
    is_buildable,
    more_traffic_than_fp16,
    one_builder,
    refuse_dropped_precision,
    refuse_other_dialect,
    refuse_other_gpu,
)
from chexnet_deploy.export.tensorrt.compile import Compiled
from chexnet_deploy.export.tensorrt.timing_cache import cache_key, read_cache, write_cache
from chexnet_deploy.runtime.sessions.trt_target import refuse_other_target
from chexnet_deploy.runtime.sessions.trt_versions import Backend, family_of


def compiled(conv_types: dict[str, str]) -> Compiled:
    return Compiled(plan=b"", layers=(), table="", timing_cache=b"", conv_types=conv_types, build_s=0.0, warnings=())


def test_the_same_machine_and_a_newer_driver_are_taken() -> None:
    refuse_other_target(TARGET, TARGET, "x")
    refuse_other_target(TARGET, TARGET.model_copy(update={"driver": "12.10"}), "x")  # 12.10 is newer than 12.4


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
        refuse_other_target(TARGET, TARGET.model_copy(update={field: value}), "plans/int8")
    for word in (getattr(TARGET, field), value, "plans/int8"):
        assert word in str(caught.value)


def test_each_tensorrt_takes_its_own_dialect(bundles: dict[str, Bundle]) -> None:
    for version in ("10.3.0", "11.0.0"):
        refuse_other_dialect(bundles["int8"], family_of("tensorrt", version))
    with pytest.raises(BundleError, match="--dialect trt8"):
        refuse_other_dialect(bundles["int8"], family_of("tensorrt", "8.6.0"))
    refuse_other_dialect(bundles["fp16"], family_of("tensorrt", "8.6.0"))


@pytest.mark.parametrize(
    ("backend", "version", "forms"),
    [
        ("tensorrt", "8.6.0", {"trt8"}),
        ("tensorrt", "10.13.3.9", {"typed", "mixed"}),
        ("tensorrt", "11.4.0.106", {"typed", "mixed"}),
        ("tensorrt_rtx", "1.7.1", {"typed", "mixed"}),
    ],
)
def test_what_each_tensorrt_builds_and_by_which_spec(
    bundles: dict[str, Bundle], backend: Backend, version: str, forms: set[str]
) -> None:
    family, int8 = family_of(backend, version), bundles["int8"].manifest
    manifests = [int8.model_copy(update={"dialect": form}) for form in ("typed", "mixed", "trt8", "cpu")]
    assert {manifest.dialect for manifest in manifests if is_buildable(manifest, family)} == forms
    assert all(is_buildable(bundles[name].manifest, family) for name in ("fp32", "fp16"))
    for bundle in bundles.values():  # a spec is named after the precision, whatever the form
        assert read_spec(bundle.manifest.precision.value).precision is bundle.manifest.precision


def test_a_gpus_spec_is_for_that_gpu() -> None:
    refuse_other_gpu(read_spec("l4-int8"), TARGET)
    refuse_other_gpu(read_spec("int8"), TARGET)
    with pytest.raises(SpecError, match=r"H200, here is NVIDIA L4"):
        refuse_other_gpu(read_spec("h200-int8"), TARGET)


def test_only_specs_that_were_measured_promise_a_speed() -> None:
    results = Path(__file__).parents[3] / "benchmarks" / "results" / "gpu-h200.json"
    proposed = "\n".join(propose(json.loads(results.read_text()), margin=1.2))
    for name in spec_names():
        spec = read_spec(name)
        limits = spec.gate.latency
        if isinstance(limits, str):
            assert limits == ("not gated" if spec.gpu is None else "unproven"), name
        else:
            assert spec.gpu == "H200"
            assert f"latency = {{ p50_ms = {limits.p50_ms}, p99_ms = {limits.p99_ms} }}" in proposed, name


def test_a_convolution_that_fell_back_is_named(bundles: dict[str, Bundle]) -> None:
    manifest = bundles["int8"].manifest
    types = {"/features/conv0/Conv": "float16", "/a/Conv": "int8", "/b/Conv": "int8", "/Conv": "float32"}
    refuse_dropped_precision(manifest, compiled(types))
    with pytest.raises(ExportError, match=r"1 convolutions do not run in int8, e\.g\. /b/Conv in float32"):
        refuse_dropped_precision(manifest, compiled({**types, "/b/Conv": "float32"}))


def test_a_type_that_the_table_does_not_say_is_not_refused(bundles: dict[str, Bundle]) -> None:
    types = {"/features/conv0/Conv": "float16", "/a/Conv": "unknown", "/b/Conv": "int8", "/Conv": "float32"}
    refuse_dropped_precision(bundles["int8"].manifest, compiled(types))
    with pytest.raises(ExportError, match="/b/Conv in float16"):
        refuse_dropped_precision(bundles["int8"].manifest, compiled({**types, "/b/Conv": "float16"}))


def test_an_int8_plan_that_moves_more_than_the_fp16_one_beside_it_warns(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    def write_plan(name: str, precision: str, traffic: int | None, **changes: object) -> Manifest:
        card = CARD.model_copy(update={"bytes_per_image": traffic})
        parent, files = bundles[precision].manifest, {PLAN_MODEL: "0" * 64, PROBE: "0" * 64}
        plan = parent.model_copy(update={"target": TARGET, "engine": card, "files": files, **changes})
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_bytes(plan.to_json())
        return plan

    int8 = bundles["int8"].manifest
    out = tmp_path / "int8"

    def warning(traffic: int | None = 9_820_000) -> str | None:
        return more_traffic_than_fp16(out, int8, TARGET, traffic)

    write_plan("a-broken", "fp16", 1)
    (tmp_path / "a-broken" / MANIFEST).write_text("{}")
    write_plan("fp32", "fp32", 1)
    write_plan("other-checkpoint", "fp16", 1, checkpoint_sha256="f" * 64)
    write_plan("other-gpu", "fp16", 1, target=TARGET.model_copy(update={"gpu": "NVIDIA T4"}))
    write_plan("unknown", "fp16", None)
    assert warning() is None
    write_plan("z-fp16", "fp16", 8_690_000)
    assert warning() == (
        f"this int8 plan moves 9.82 MB an image, the fp16 one in {tmp_path / 'z-fp16'} 8.69: "
        "expect it to be slower where memory is the limit"
    )
    assert warning(8_690_000) is None
    assert warning(None) is None
    assert more_traffic_than_fp16(out, bundles["fp16"].manifest, TARGET, 9_820_000) is None


def test_wrong_requests_are_refused_before_a_gpu_is_looked_for(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Give its own spec"):
        build_tensorrt_plan(bundles["fp16"], read_spec("int8"), tmp_path / "out")
    with pytest.raises(BundleError, match="there already"):
        build_tensorrt_plan(bundles["fp16"], read_spec("fp16"), tmp_path)


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
    key = cache_key(SHA256, TARGET, spec)
    assert read_cache(path, key) == (b"", None)
    write_cache(path, key, b"timings\nwith a line break")
    assert read_cache(path, key) == (b"timings\nwith a line break", None)
    others = (
        cache_key("1" * 64, TARGET, spec),
        cache_key(SHA256, TARGET.model_copy(update={"driver": "12.5"}), spec),
        cache_key(SHA256, TARGET, read_spec("fp16")),
    )
    for other in others:
        content, message = read_cache(path, other)
        assert (content, message is not None and "another model" in message) == (b"", True)


@pytest.mark.parametrize("damage", [b"", b"no JSON", b"[]\nx", b"{}\nx"])
def test_a_damaged_timing_cache_is_left_aside(tmp_path: Path, damage: bytes) -> None:
    path, key = tmp_path / "cache", cache_key(SHA256, TARGET, read_spec("int8"))
    write_cache(path, key, b"timings")
    whole = path.read_bytes()
    for content in (damage, whole[:-1]):
        path.write_bytes(content)
        got, message = read_cache(path, key)
        assert got == b""
        assert message is not None
        assert "was not used" in message


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_one_line_says_so(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    with pytest.raises((SessionError, MissingPackageError), match=r"pycuda|driver|GPU"):
        build_tensorrt_plan(bundles["fp16"], read_spec("fp16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("without_gpu")
def test_export_plan_looks_for_the_gpu_before_it_works(checkpoint_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chexnet_deploy", "export", str(checkpoint_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--plan"], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
