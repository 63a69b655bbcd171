"""Bundles -> a model repository of NVIDIA Triton Inference Server, and back: is a repository still that of its bundles?

    REPOSITORY/chexnet_int8/config.pbtxt     the model as Triton is told of it
                            labels.txt       the findings, in the order of the logits
                            warmup/pixels    one probe image as raw bytes
                            1/               a version: the bundle itself, byte for byte

Triton looks for model.onnx and model.plan in a version's folder and ignores what lies beside them, so a version can be opened,
verified and run like every bundle. All other files follow from the bundles alone: check_repository makes them again and
compares. Runs no server.

Formats: Triton's docs/user_guide/model_repository.md and model_configuration.md, and its protobuf ModelConfig.
"""

import errno
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from chexnet_deploy.bundle import Bundle, Trust
from chexnet_deploy.bundle.manifest import FLOAT16_DIALECTS, MANIFEST, MANIFEST_SHA256, PROBE, Manifest
from chexnet_deploy.bundle.signing.attestation import ATTESTATION, ATTESTATION_SIGNATURE
from chexnet_deploy.bundle.signing.signatures import SIGNATURE
from chexnet_deploy.errors import BundleError
from chexnet_deploy.files import PlainFile, new_directory
from chexnet_deploy.runtime.sessions.base import MAX_BATCH

Device: TypeAlias = Literal["cpu", "gpu"]

_DEVICES: Final[tuple[Device, ...]] = ("cpu", "gpu")
CONFIG: Final = "config.pbtxt"
LABELS: Final = "labels.txt"
WARMUP: Final = "warmup/pixels"
MAX_FILE_BYTES: Final = 2**24  # of a probe image of 1024 px, and far above any config
# Batches that Triton forms of ONNX models. A client may send up to MAX_BATCH at once, but what others wait for stays small.
PREFERRED_BATCHES: Final = (4, 8, 16)
# What is rejected at once instead of waiting: at 7 ms an image on two cores the last of 64 is answered after half a second.
MIN_QUEUE: Final = 64
QUEUE_TIMEOUT_US: Final = 10_000_000
ORT_FOR_TYPED_INT8: Final = "1.30"


@dataclass(frozen=True, slots=True)
class TritonModel:
    """One model of a repository: versions that differ in their weights alone.

    Attributes:
        name: of its folder, and in every request.
        device: what runs its instances.
        versions: bundle by version number, in order.
    """

    name: str
    device: Device
    versions: Mapping[int, Bundle]


def write_repository(path: Path, bundles: Sequence[Bundle], *, device: Device | None = None) -> list[TritonModel]:
    """Write a new model repository in one step: afterwards it is there and complete, or not there.

    Releases of one line in one precision are versions of one model, numbered as the releases; any other bundle is version 1.

    Args:
        path: where; nothing may be there yet.
        bundles: ONNX bundles or plans.
        device: what runs ONNX bundles; None is the CPU, where they were proven. Plans know their GPU.

    Raises:
        BundleError: something is there already, it can't be written, two bundles would be the same version, versions take
            or give other tensors, or Triton can't run a bundle.
    """
    models = _models(bundles, device)
    contents = {model.name: _model_files(model) for model in models}
    if path.exists() or path.is_symlink():
        raise BundleError(f"{path} is there already. Choose another place, or delete it first.")
    try:
        with new_directory(path) as partial:
            for name, files in contents.items():
                for file, content in files.items():
                    (partial / name / file).parent.mkdir(parents=True, exist_ok=True)
                    (partial / name / file).write_bytes(content)
    except OSError as err:
        hint = " The disk is full." if err.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise BundleError(f"{path} could not be written: {err.strerror}.{hint} Nothing was left behind.") from err
    return check_repository(path)


def check_repository(path: Path, *, trust: Trust | None = None) -> list[TritonModel]:
    """Verify every bundle of a repository, and that the files around them are those that belong to them.

    Args:
        path: the repository.
        trust: whose signature every version needs; see Bundle.open.

    Raises:
        BundleError: a bundle is damaged; a config, label or warm-up file was changed; or there is more or less than there
            should be.
        TrustError, MissingPackageError: see Bundle.open.
    """
    if not is_repository(path):
        raise BundleError(f"{path} is no Triton model repository: found no model with a {CONFIG} and a version in it.")
    models = []
    for folder in sorted(path.iterdir()):
        versions = [place for place in sorted(folder.glob("[0-9]*")) if (place / MANIFEST).exists()]
        if not versions:
            raise BundleError(
                f"{folder} holds no version with a bundle in it. Delete it, or export the repository again."
            )
        bundles = [Bundle.open(place, trust=trust) for place in versions]
        models.append(_check_model(folder, bundles))
    return models


def is_repository(path: Path) -> bool:
    """Return whether a folder looks like a model repository of bundles."""
    return any(path.glob(f"*/{CONFIG}")) and any(path.glob(f"*/[0-9]*/{MANIFEST}"))


def _check_model(folder: Path, bundles: Sequence[Bundle]) -> TritonModel:
    """Compare one model's folder with the one that its bundles make, on either device."""
    config = _read(folder / CONFIG)
    for device in _DEVICES:
        try:
            models = _models(bundles, device)
        except BundleError:
            continue  # plans don't run on a CPU
        files = _model_files(models[0])
        if len(models) == 1 and folder.name == models[0].name and files[CONFIG] == config:
            break
    else:
        raise BundleError(f"{folder / CONFIG} is not the one of the bundles beside it. Export the repository again.")
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    if there != set(files):
        names = ", ".join(map(ascii, sorted(there ^ set(files))[:5]))
        raise BundleError(f"{folder} should not hold, or should: {names}. Export the repository again.")
    for name, content in files.items():
        if _read(folder / name, max(MAX_FILE_BYTES, len(content))) != content:
            raise BundleError(f"{folder / name} was changed after it was written. Export the repository again.")
    return models[0]


def _models(bundles: Sequence[Bundle], device: Device | None) -> list[TritonModel]:
    """Return the models that bundles make, by name."""
    if not bundles:
        raise BundleError("found no bundle, needed at least one to serve.")
    grouped: dict[str, dict[int, Bundle]] = {}
    for bundle in bundles:
        _refuse_unservable(bundle, device)
        version = 1 if bundle.manifest.release is None else bundle.manifest.release.number
        versions = grouped.setdefault(model_name(bundle.manifest), {})
        if version in versions:
            raise BundleError(
                f"{bundle.path} and {versions[version].path} would both be version {version} of {model_name(bundle.manifest)}. "
                f"Give one of them, or export them as releases with numbers of their own."
            )
        first = next(iter(versions.values()), bundle)
        if _interface(first.manifest) != _interface(bundle.manifest):
            raise BundleError(
                f"{bundle.path} and {first.path} take or give other tensors, so they can't be versions of one model. "
                f"Make a repository of each."
            )
        versions[version] = bundle
    models = []
    for name in sorted(grouped):
        is_plan = any(bundle.manifest.engine is not None for bundle in grouped[name].values())
        models.append(TritonModel(name, "gpu" if is_plan else device or "cpu", dict(sorted(grouped[name].items()))))
    return models


def model_name(manifest: Manifest) -> str:
    """Return what a bundle's model is called, e.g. chexnet_int8_cpu or chexnet-adult_fp16_plan."""
    line = "chexnet" if manifest.release is None else manifest.release.line
    dialect = [manifest.dialect] if manifest.dialect in ("mixed", "trt8", "cpu") else []
    return "_".join([line, manifest.precision.value, *dialect, *(["plan"] if manifest.engine is not None else [])])


def _refuse_unservable(bundle: Bundle, device: Device | None) -> None:
    manifest = bundle.manifest
    if manifest.target is not None and manifest.target.backend != "tensorrt":
        raise BundleError(
            f"{bundle.path} is a plan of {manifest.target.backend}, which Triton has no backend for. "
            f"Build it with --backend tensorrt."
        )
    if manifest.engine is not None and (device == "cpu" or manifest.engine.batch[0] > 1):
        found = (
            "a plan, which needs a GPU" if device == "cpu" else f"a plan for {manifest.engine.batch[0]} images or more"
        )
        raise BundleError(f"{bundle.path} is {found}; Triton would send it single images. Serve another bundle.")
    if manifest.dialect == "cpu" and device == "gpu":
        raise BundleError(f"{bundle.path} is an int8 for CPUs, and was proven on none but those. Serve it on the CPU.")
    if any(not finding.isprintable() for finding in manifest.findings):
        raise BundleError(f"{bundle.path}: a finding's name holds a line break, and {LABELS} has a line for each.")


def _interface(manifest: Manifest) -> tuple[object, ...]:
    """Return what all versions of a model must agree on, as one config describes them."""
    return manifest.findings, manifest.preprocessing, _batches(manifest)


def _batches(manifest: Manifest) -> tuple[int, tuple[int, ...]]:
    """Return the largest batch, and those that are worth forming."""
    if manifest.engine is None:
        return MAX_BATCH, PREFERRED_BATCHES
    _smallest, tuned, largest = manifest.engine.batch
    return largest, tuple(sorted({tuned, largest} - {1}))


def _model_files(model: TritonModel) -> dict[str, bytes]:
    """Return every file of a model's folder by its name in it."""
    newest = model.versions[max(model.versions)]
    files = {
        CONFIG: config_text(model).encode(),
        LABELS: "".join(f"{finding}\n" for finding in newest.manifest.findings).encode(),
        WARMUP: newest.read_probe().pixels[0].tobytes(),
    }
    for version, bundle in model.versions.items():
        files |= {f"{version}/{name}": content for name, content in _bundle_files(bundle).items()}
    return files


def _bundle_files(bundle: Bundle) -> dict[str, bytes]:
    files = {
        bundle.manifest.model_name: bundle.read_model(),
        PROBE: bundle.read_probe_bytes(),
        MANIFEST: bundle.read_manifest_bytes(),
        MANIFEST_SHA256: f"{bundle.id}\n".encode(),
    }
    for name in (SIGNATURE, ATTESTATION, ATTESTATION_SIGNATURE):
        if (bundle.path / name).exists():
            files[name] = _read(bundle.path / name)
    return files


def _read(path: Path, limit_bytes: int = MAX_FILE_BYTES) -> bytes:
    file = PlainFile(path=path, limit_bytes=limit_bytes, error=BundleError, next_step="Export the repository again.")
    return file.read()


def config_text(model: TritonModel) -> str:
    """Return a model's config.pbtxt: protobuf text of Triton's ModelConfig."""
    manifest = model.versions[max(model.versions)].manifest
    side, n_findings = manifest.preprocessing.resize_px, len(manifest.findings)
    max_batch, preferred = _batches(manifest)
    cells = side // 32
    lines = [
        f"name: {json.dumps(model.name)}",
        f"platform: {json.dumps('onnxruntime_onnx' if manifest.engine is None else 'tensorrt_plan')}",
        f"max_batch_size: {max_batch}",
        f'input {{ name: "pixels" data_type: TYPE_UINT8 dims: [ 1, {side}, {side} ] }}',
        f'output {{ name: "logits" data_type: TYPE_FP32 dims: [ {n_findings} ] label_filename: "{LABELS}" }}',
        f'output {{ name: "cam" data_type: TYPE_FP32 dims: [ {n_findings}, {cells}, {cells} ] }}',
        # Every version that was exported and no other: one that somebody adds by hand was proven by nobody.
        f"version_policy {{ specific {{ versions: [ {', '.join(map(str, model.versions))} ] }} }}",
        f"instance_group {{ count: 1 kind: KIND_{model.device.upper()} }}",
        *_batching_lines(max_batch, preferred),
        *_warmup_lines(side, preferred),
        *_optimization_lines(manifest, model.device),
        *_parameter_lines(model),
    ]
    return "".join(f"{line}\n" for line in lines)


def _batching_lines(max_batch: int, preferred: Sequence[int]) -> Iterator[str]:
    """Yield the dynamic batcher: a lone image never waits for others, and what waits too long is told so."""
    yield "dynamic_batching {"
    if preferred:
        yield f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]"
    yield "  max_queue_delay_microseconds: 0"
    yield "  default_queue_policy {"
    yield "    timeout_action: REJECT"
    yield f"    default_timeout_microseconds: {QUEUE_TIMEOUT_US}"
    yield "    allow_timeout_override: true"
    # While one batch is computed the next one must fit.
    yield f"    max_queue_size: {max(MIN_QUEUE, 2 * max(preferred, default=1))}"
    yield "  }"
    yield "}"


def _warmup_lines(side: int, preferred: Sequence[int]) -> Iterator[str]:
    """Yield a run of each batch size, so that the first radiograph pays for no allocation and no choice of kernels."""
    for batch in (1, *preferred):
        tensor = f'data_type: TYPE_UINT8 dims: [ 1, {side}, {side} ] input_data_file: "{Path(WARMUP).name}"'
        yield f'model_warmup {{ name: "batch_{batch}" batch_size: {batch} inputs {{ key: "pixels" value {{ {tensor} }} }} }}'


def _optimization_lines(manifest: Manifest, device: Device) -> Iterator[str]:
    """Yield what keeps the backend from answering otherwise than this project's own sessions do.

    No accelerator is named on a CPU: OpenVINO, compiled for an open batch as Triton would, answers quantised models of this
    network wrongly. No TensorRT inside ONNX Runtime either: it builds engines that nobody proved. `build` proves its own.
    """
    if manifest.engine is None and device == "gpu":
        # TF32 would round float32 to ten bits of mantissa, silently; ONNX Runtime has it on.
        yield (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "cuda" '
            'parameters { key: "use_tf32" value: "0" } } } }'
        )


def _parameter_lines(model: TritonModel) -> Iterator[str]:
    """Yield where each version comes from; Triton hands them out with the model's configuration."""
    for version, bundle in model.versions.items():
        for key, value in _origin(bundle):
            yield f"parameters {{ key: {json.dumps(f'{version}.{key}')} value {{ string_value: {json.dumps(value)} }} }}"


def _origin(bundle: Bundle) -> Iterable[tuple[str, str]]:
    manifest = bundle.manifest
    yield "bundle", bundle.id
    yield "precision", manifest.precision.value
    yield "dialect", manifest.dialect
    yield "model_sha256", manifest.files[manifest.model_name]
    yield "checkpoint_sha256", manifest.checkpoint_sha256
    yield "ancestors", ",".join(manifest.ancestors)
    yield "preprocessing", manifest.preprocessing.model_dump_json()
    yield "operating_points", json.dumps(manifest.operating_points)
    if manifest.target is not None:
        yield "target", manifest.target.model_dump_json()
    elif manifest.dialect in FLOAT16_DIALECTS:
        yield "onnxruntime_at_least", ORT_FOR_TYPED_INT8
