"""The command that serves a bundle over HTTP."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from chexnet_deploy.cli.options import BundleArgument, JsonFlag, OnProvider, ProviderName, Threads, TrustOption
from chexnet_deploy.errors import require, require_linux
from chexnet_deploy.terminal import print_json

app = typer.Typer()
_TOLD = ("verdict", "reason", "worker", "differs", "before", "destination")  # of an audit line, to a person


@app.command(epilog="Example: chexnet-deploy serve bundles/int8 --port 8000")
def serve(
    bundle: BundleArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen on. There are no passwords and no TLS: beyond loopback use a proxy.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one and logs it.")] = 8000,
    name: Annotated[str, typer.Option(help="The model's name in URLs.")] = "chexnet",
    trust: TrustOption = None,
    provider: OnProvider = ProviderName.AUTO,
    threads: Threads = None,
    max_batch: Annotated[int, typer.Option(help="Images in one request, and in one run.")] = 16,
    window_ms: Annotated[float, typer.Option(help="How long a busy service waits to fill a batch.")] = 0.0,
    queue: Annotated[int, typer.Option(help="Images admitted and not answered yet; beyond it 503.")] = 64,
    deadline_s: Annotated[float, typer.Option(help="What waits longer for inference is dropped, with 503.")] = 5.0,
    decoders: Annotated[int, typer.Option(help="Images decoded at once.")] = 2,
    max_body_mib: Annotated[int, typer.Option(help="Of one request, counted after inflating.")] = 64,
    max_held_mib: Annotated[int, typer.Option(help="Request bodies in memory, all together.")] = 512,
    max_connections: Annotated[int, typer.Option(help="Open at once; beyond it the slowest gives way.")] = 512,
    receive_s: Annotated[float, typer.Option(help="From a request's first byte to its last.")] = 10.0,
    answer_s: Annotated[float, typer.Option(help="From a request's last byte to its answer's last.")] = 30.0,
    drain_s: Annotated[float, typer.Option(help="After SIGTERM, for what was admitted.")] = 20.0,
    saturation_s: Annotated[
        float, typer.Option(help="Between two images whose int8 activations are looked at; 0 for never.")
    ] = 10.0,
    self_test_s: Annotated[
        float, typer.Option(help="Between two times the engine is asked for its known answers; 0 for never.")
    ] = 15.0,
    shadow_images: Annotated[int, typer.Option(help="Newest images kept in memory for a swap's comparison.")] = 16,
    swap_tolerance: Annotated[
        float, typer.Option(help="Largest |probability difference| to the running bundle that a swap allows.")
    ] = 0.02,
) -> None:
    """Serve a bundle over HTTP until SIGTERM; SIGHUP takes the bundle that lies at its path then, if it proves itself."""
    require_linux("serve")
    with require("serve"):
        from chexnet_deploy.serving.http import program
    from chexnet_deploy.serving.http.config import ServeConfig

    config = ServeConfig(
        bundle=bundle,
        host=host,
        port=port,
        name=name,
        trust=trust,
        provider=provider.value,
        threads=threads,
        max_batch=max_batch,
        window_ms=window_ms,
        queue_images=queue,
        deadline_s=deadline_s,
        decoders=decoders,
        max_body_mib=max_body_mib,
        max_held_mib=max_held_mib,
        max_connections=max_connections,
        receive_s=receive_s,
        answer_s=answer_s,
        drain_s=drain_s,
        saturation_s=saturation_s,
        self_test_s=self_test_s,
        shadow_images=shadow_images,
        swap_tolerance=swap_tolerance,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    raise typer.Exit(program.serve(config))


class _RunUnlessNamed(TyperGroup):
    """`node CONFIG` runs a node; status and resend ask one that runs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] == "--help"
        return super().parse_args(ctx, args if named else ["run", *args])


node_app = typer.Typer(
    cls=_RunUnlessNamed,
    no_args_is_help=True,
    help="Run a DICOM node (`node CONFIG`), or ask one that runs.",
    epilog="Example: chexnet-deploy node node.toml",
)


@node_app.callback()
def _needs_linux() -> None:
    require_linux("the DICOM node")


ConfigArgument = Annotated[Path, typer.Argument(help="The node's TOML file.")]


@node_app.command("run", epilog="Example: chexnet-deploy node node.toml")
def run_node(
    config: ConfigArgument,
    print_unit: Annotated[
        bool, typer.Option("--print-unit", help="Print a hardened systemd unit for it, and do nothing else.")
    ] = False,
) -> None:
    """Run a DICOM node: radiographs in by C-STORE, results out by C-STORE, until SIGTERM."""
    with require("node"):
        from chexnet_deploy.dicom.node import service

    if print_unit:
        typer.echo(service.print_unit(config, Path(sys.argv[0]).absolute()), nl=False)
        return
    raise typer.Exit(service.run(config))


@node_app.command("status", epilog="Example: chexnet-deploy node status node.toml")
def show_status(config: ConfigArgument, as_json: JsonFlag = False) -> None:
    """Print what waits, what was refused and what failed, and why."""
    from chexnet_deploy.dicom.node.config import read_config
    from chexnet_deploy.dicom.node.control import ask

    found = ask(read_config(config).folder, "status")
    if as_json:
        print_json(found)
        return
    images = found["images"]
    typer.echo(f"model  {'ready' if found['is_ready'] else 'not ready'}")
    typer.echo(f"images  {images['waiting']} waiting, {images['answered']} answered")
    for state in ("refused", "failed"):
        for reason, count in sorted(images[state].items()):
            typer.echo(f"images  {count} {state} {reason}")
    for title, states in found["destinations"].items():
        typer.echo(f"{title}  " + (", ".join(f"{count} {state}" for state, count in states.items()) or "nothing yet"))


@node_app.command("resend", epilog="Example: chexnet-deploy node resend node.toml --uid 1.2.840.1")
def resend(
    config: ConfigArgument,
    uid: Annotated[str, typer.Option(help="SOP Instance UID of the image.")],
    as_json: JsonFlag = False,
) -> None:
    """Send an image's results again; where they aren't kept any more, let the image be answered when it is sent again."""
    from chexnet_deploy.dicom.node.config import read_config
    from chexnet_deploy.dicom.node.control import ask
    from chexnet_deploy.errors import NodeError

    found = ask(read_config(config).folder, "resend", uid.strip())
    if not (found["documents"] or found["forgotten"]):
        raise NodeError("the node has answered no image of this UID, as far as it remembers. Send it the image.")
    if as_json:
        print_json(found)
    elif found["documents"]:
        typer.echo(f"{found['documents']} documents are sent again")
    else:
        typer.echo(
            "nothing is kept to send again; send the node the image, and it is answered again under the same UIDs"
        )


audit_app = typer.Typer(
    no_args_is_help=True,
    help="Check a node's audit log.",
    epilog="Example: chexnet-deploy audit verify node/audit.jsonl",
)


@audit_app.command("find", epilog="Example: chexnet-deploy audit find node/audit.jsonl --uid 1.2.840.1")
def find_in_audit(
    file: Annotated[Path, typer.Argument(help="The log, audit.jsonl, in the node's folder, as its key is needed.")],
    uid: Annotated[str, typer.Option(help="SOP Instance UID of the image.")],
    as_json: JsonFlag = False,
) -> None:
    """Check the log, and print what it says of one image."""
    with require("node"):
        from chexnet_deploy.dicom.node.audit import find
        from chexnet_deploy.dicom.node.inbox import Pseudonyms

    lines = find(file, Pseudonyms.read(file.parent).instance(uid.strip()))
    if as_json:
        print_json(lines)
        return
    for line in lines:
        told = (f"{name} {line[name]}" for name in _TOLD if line.get(name))
        typer.echo("  ".join((line["utc"], line["event"], *told)))
    if not lines:
        typer.echo("nothing")


@audit_app.command("verify", epilog="Example: chexnet-deploy audit verify node/audit.jsonl")
def verify_audit(
    file: Annotated[Path, typer.Argument(help="The log, audit.jsonl in the node's folder.")],
    head: Annotated[
        str | None, typer.Option(help="The hash that its last line must have, as noted elsewhere; default: FILE.head.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Detect every edit, deletion, changed order and, by its head, lines cut from the end; print the head."""
    from chexnet_deploy.dicom.node.audit import verify_file

    found = verify_file(file, head)
    if as_json:
        print_json({"lines": found.seq, "head": found.hash})
        return
    typer.echo(f"{file}  {found.seq} lines  head {found.hash}")
