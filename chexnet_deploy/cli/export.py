"""Commands export, import and build: checkpoint -> bundles, bundle -> TensorRT plan."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chexnet_deploy.cli.options import ContractOption, DataOption, JsonFlag, TrustOption, read_trust
from chexnet_deploy.cli.printing import print_record, print_repository
from chexnet_deploy.errors import SpecError
from chexnet_deploy.terminal import cancellation, print_json, progress

if TYPE_CHECKING:
    from chexnet_deploy.bundle.signing.releases import Release


app = typer.Typer()


class Decoding(str, Enum):
    """How JPEG 2000 is decoded."""

    EXACT = "exact"
    REDUCED = "reduced"


class TritonDevice(str, Enum):
    """Where Triton runs ONNX bundles."""

    CPU = "cpu"
    GPU = "gpu"


@app.command(epilog="Example: chexnet-deploy export best.safetensors --out bundles --precision fp16")
def export(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT | ONNX | BUNDLE...",
            help="A .safetensors file of python -m training or import; or anyone's ONNX file, with --contract; "
            "or bundles, for --triton.",
        ),
    ],
    contract: ContractOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the bundles; each precision gets one in it.")] = None,
    precision: Annotated[str, typer.Option(help="Comma-separated: fp32, fp16, int8. fp32 is always made.")] = "fp32",
    calibration: Annotated[
        Path | None, typer.Option(help="Image names for int8, one a line; default: chosen, and written to OUT.")
    ] = None,
    calibration_images: Annotated[int, typer.Option(help="How many to choose, where no list is given.")] = 256,
    data: DataOption = None,
    dialect: Annotated[
        str,
        typer.Option(
            help="Comma-separated forms of int8: typed or mixed (TensorRT 10 and later), trt8 (TensorRT 8.6), cpu."
        ),
    ] = "typed",
    scope: Annotated[
        Path | None, typer.Option(help="TOML: modalities, body parts, views and ages the model is meant for.")
    ] = None,
    decode: Annotated[
        Decoding,
        typer.Option(help="JPEG 2000: every pixel; or smaller pictures in it, kept only if the model answers alike."),
    ] = Decoding.EXACT,
    plan: Annotated[bool, typer.Option("--plan", help="Build a TensorRT plan of each too, on the GPU here.")] = False,
    line: Annotated[str | None, typer.Option(help="The model line this is a release of, e.g. chexnet-adult.")] = None,
    release: Annotated[
        int | None, typer.Option(min=1, help="Its number, greater than every one before; needs --line.")
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="New folder: a model repository of the bundles for NVIDIA Triton.")
    ] = None,
    triton_device: Annotated[
        TritonDevice | None,
        typer.Option(help="What runs ONNX bundles in Triton; default: cpu. Plans run on their GPU."),
    ] = None,
    trust: TrustOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make fp32, fp16 and int8 bundles of a checkpoint; each is kept only if it answers as the one before.

    With --triton also a model repository of them; or of bundles that are there, ONNX or plans, where those are named.
    """
    from chexnet_deploy.bundle.bundle import Bundle
    from chexnet_deploy.cli.options import parse_dialects, parse_precisions
    from chexnet_deploy.datasets.data_set import open_data
    from chexnet_deploy.export.chain import build_plan, export_bundles, require_tensorrt
    from chexnet_deploy.images.scope import read_scope

    are_bundles = all(source.is_dir() for source in sources)
    _check_export(context, are_bundles=are_bundles, n_sources=len(sources), out=out, triton=triton)
    if are_bundles:
        bundles = [Bundle.open(source, trust=read_trust(trust)) for source in sources]
    else:
        assert out is not None  # _check_export
        policy = None if scope is None else read_scope(scope)
        if plan:
            require_tensorrt("tensorrt")
        with progress() as on_phase:
            bundles = export_bundles(
                sources[0],
                out,
                parse_precisions(precision),
                data_root=data,
                calibration_list=calibration,
                n_calibration_images=calibration_images,
                dialects=parse_dialects(dialect),
                contract=contract,
                release=_release(line, release),
                on_phase=on_phase,
                scope=policy,
                is_reduced=decode is Decoding.REDUCED,
            )
            for note in () if data is None else open_data(data).notes:
                typer.echo(f"note: {note}", err=True)
            if plan:
                with cancellation() as cancelled:
                    bundles += [
                        build_plan(b.path, out / f"{b.path.name}-plan", None, cancelled=cancelled, on_phase=on_phase)
                        for b in bundles
                    ]
    if triton is not None:
        from chexnet_deploy.serving.triton import write_repository

        models = write_repository(triton, bundles, device=None if triton_device is None else triton_device.value)
    if as_json:
        print_json({b.path.name: {"path": str(b.path), "id": b.id} for b in bundles})
        return
    for bundle in bundles:
        typer.echo(f"{bundle.path}  {bundle.manifest.precision.value}  id {bundle.id[:12]}")
        for check in () if are_bundles else bundle.manifest.checks:
            typer.echo(f"  {check.name}: {check.value:.3g} (limit {check.limit:g})")
    if triton is not None:
        print_repository(triton, models)


def _check_export(
    context: typer.Context, *, are_bundles: bool, n_sources: int, out: Path | None, triton: Path | None
) -> None:
    """Refuse options that don't go together, before any work.

    Raises:
        SpecError: says which, and what to omit or to give.
    """
    given = {
        name.replace("_", "-")
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    }
    if are_bundles:
        if triton is None:
            raise SpecError(
                "found bundles and no --triton; export makes bundles of a checkpoint. Give a .safetensors file."
            )
        if makes := sorted(given - {"sources", "triton", "triton-device", "trust", "as-json"}):
            raise SpecError(f"--{', --'.join(makes)}: for a checkpoint, and bundles are there already. Omit it.")
        return
    if n_sources != 1:
        raise SpecError(f"found {n_sources} paths that are not all bundles; needed one checkpoint, or bundles alone.")
    if out is None:
        raise SpecError("found no --out, needed a folder for the bundles. Give it.")
    if "trust" in given:
        raise SpecError("checkpoints aren't signed, and --trust is for bundles. Omit it.")
    if triton is None and "triton-device" in given:
        raise SpecError("--triton-device is for a model repository. Give --triton, or omit it.")
    if triton is not None and triton.exists():
        raise SpecError(f"{triton} is there already. Choose another --triton, or delete it first.")


@app.command("import", epilog="Example: chexnet-deploy import checkpoint --out best.safetensors --form jrzech")
def import_checkpoint(
    file: Annotated[
        Path,
        typer.Argument(help="A CheXNet file of PyTorch, e.g. model.pth.tar or .safetensors; no code in it is run."),
    ],
    out: Annotated[Path, typer.Option(help="New .safetensors file, for export.")],
    form: Annotated[
        str | None, typer.Option(help="Where it comes from: arnoweng, zoogzog, jrzech or torchxrayvision-all.")
    ] = None,
    findings: Annotated[
        Path | None, typer.Option(help="Where no form fits: names of the model's outputs in order, one a line.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a published CheXNet file into a checkpoint; what doesn't fit exactly is refused."""
    from chexnet_deploy.export.chain import import_checkpoint as run

    made = run(file, out, form, findings)
    for note in made.notes:
        typer.echo(f"warning: {note}", err=True)
    if as_json:
        print_json({"path": str(out), "sha256": made.checkpoint.sha256, "notes": made.notes})
        return
    typer.echo(f"{out}  {len(made.checkpoint.manifest.findings)} findings  sha256 {made.checkpoint.sha256[:12]}")


class BackendName(str, Enum):
    """The TensorRT flavours."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"


@app.command(epilog="Example: chexnet-deploy build bundles/int8 --out bundles/int8-plan")
def build(
    bundle: Annotated[Path, typer.Argument(help="An fp32, fp16 or int8 bundle that export wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the plan's bundle.")],
    spec: Annotated[str | None, typer.Option(help="A spec's name or .toml; default: that of the precision.")] = None,
    backend: Annotated[BackendName, typer.Option(help="Which TensorRT builds it.")] = BackendName.TENSORRT,
    device: Annotated[int, typer.Option(min=0, help="The GPU's number.")] = 0,
    timing_cache: Annotated[
        Path | None, typer.Option(help="A file that makes the same build quicker next time.")
    ] = None,
    trust: TrustOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Build a TensorRT plan of a bundle on the GPU it will run on; kept only if it gives the known answers."""
    from chexnet_deploy.export.chain import build_plan

    with progress() as on_phase, cancellation() as cancelled:
        made = build_plan(
            bundle,
            out,
            spec,
            backend=backend.value,
            device=device,
            timing_cache=timing_cache,
            trust=read_trust(trust),
            cancelled=cancelled,
            on_phase=on_phase,
        )
    if as_json:
        print_record(made.manifest)
        return
    card = made.manifest.engine
    assert card is not None  # a plan's manifest has one
    typer.echo(f"{made.path}  {made.manifest.precision.value}  id {made.id[:12]}  built in {card.build_s:.1f} s")
    typer.echo(f"  convolutions: {', '.join(f'{n} in {kind}' for kind, n in card.conv_types.items())}")
    traffic = "unknown" if card.bytes_per_image is None else f"{card.bytes_per_image / 1e6:.2f} MB an image"
    typer.echo(f"  {card.n_kernels} kernels; activations they read and write: {traffic}")
    for warning in card.warnings:
        typer.echo(f"warning: {warning}", err=True)


def _release(line: str | None, number: int | None) -> "Release | None":
    """Return the release that two options name, or none."""
    from pydantic import ValidationError

    from chexnet_deploy.bundle.signing.releases import Release

    if line is None and number is None:
        return None
    if line is None or number is None:
        raise SpecError("found one of --line and --release, needed both or neither. Give the other too.")
    try:
        return Release(line=line, number=number)
    except ValidationError as err:
        first = err.errors()[0]
        raise SpecError(f"--{'line' if 'line' in first['loc'] else 'release'}: {first['msg']}. Correct it.") from err
