"""The commands about keys and signatures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chexnet_deploy.cli.options import BundleArgument, JsonFlag
from chexnet_deploy.errors import require

if TYPE_CHECKING:
    from types import ModuleType

    from chexnet_deploy.bundle.bundle import Bundle


app = typer.Typer()


@app.command(epilog="Example: chexnet-deploy keygen release.pem")
def keygen(
    key: Annotated[Path, typer.Argument(help="New file for the private key (PEM, mode 600).")],
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Ask for a passphrase to encrypt it with.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make an Ed25519 key to sign bundles with, and print its public half as lines of a trust file."""
    import base64

    keys = _import_keys()
    passphrase = None
    if encrypt:
        passphrase = typer.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True).encode()
    der = keys.public_der(keys.make_private_key(key, passphrase))
    public = base64.b64encode(der).decode()
    if as_json:
        typer.echo(json.dumps({"path": str(key), "fingerprint": keys.fingerprint(der), "public_key": public}))
        return
    typer.echo(f'# fingerprint {keys.fingerprint(der)}\n[[keys]]\nname = "{_name_of(key)}"\npublic_key = "{public}"')


@app.command(epilog="Example: chexnet-deploy sign bundles/int8 --key release.pem")
def sign(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or the site file beside one.")],
    key: Annotated[Path, typer.Option(help="Private key: Ed25519, PEM, mode 600.")],
    attestation: Annotated[
        Path | None, typer.Option(help="What bench wrote of this bundle: put into it, and signed too.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Verify a bundle and sign its manifest, or a site file; its id stays, and so do signatures by other keys."""
    keys = _import_keys()
    from chexnet_deploy.bundle.signing.sign import sign_bundle, sign_site
    from chexnet_deploy.bundle.site import SITE_SUFFIX

    pem = keys.read_key_file(key)
    passphrase = None
    if keys.is_encrypted(pem):
        passphrase = typer.prompt(f"passphrase of {key}", hide_input=True, err=True).encode()
    private = keys.load_private_key(pem, passphrase, str(key))
    if bundle.name.endswith(SITE_SUFFIX):
        if attestation is not None:
            raise typer.BadParameter(f"found {bundle}, a site file; an attestation is a bundle's. Omit --attestation.")
        signed = sign_site(bundle, private)
    else:
        signed = sign_bundle(bundle, private, attestation)
    release = signed.bundle.manifest.release
    if release is None:
        typer.echo("warning: this bundle names no release; a trust file with a line will refuse it", err=True)
    if as_json:
        typer.echo(json.dumps({"path": str(bundle), "id": signed.id, "key": signed.key}))
        return
    others = "" if signed.n_signatures == 1 else f", beside {signed.n_signatures - 1} other key(s)"
    typer.echo(f"{bundle}  id {signed.id[:12]}  signed by {signed.key[:12]}…{others}")


@app.command(epilog="Example: chexnet-deploy verify bundles/int8 --trust trust.toml")
def verify(
    bundle: BundleArgument,
    trust: Annotated[Path, typer.Option(help="Trust file.")],
    start_floor: Annotated[
        bool, typer.Option("--start-floor", help="Write the trust file's floor_file, where none is yet.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say who signed a bundle, or refuse it or the site file beside it; runs nothing, and raises no floor."""
    _import_keys()
    from chexnet_deploy.bundle import Bundle, Trust
    from chexnet_deploy.bundle.signing.sign import admit_first

    policy = Trust.read(trust)
    opened = admit_first(bundle, policy) if start_floor else Bundle.open(bundle, trust=policy)
    opened.read_site()
    if as_json:
        typer.echo(json.dumps({"path": str(bundle), "id": opened.id, "signers": opened.signers, **_release_of(opened)}))
        return
    named = ", ".join(f"{name} {value}" for name, value in _release_of(opened).items())
    if opened.attestation is not None:
        named += f"  {opened.attestation.summary} on {opened.attestation.runs_on.processor}"
    typer.echo(f"{bundle}  id {opened.id[:12]}  signed by {', '.join(opened.signers)}{named and f'  {named}'}")


def _release_of(bundle: "Bundle") -> dict[str, str | int]:
    release = bundle.manifest.release
    return {} if release is None else {"line": release.line, "release": release.number}


def _name_of(key: Path) -> str:
    """Return a name that a trust file takes, made of the key's file name."""
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in key.stem)
    return name.strip("._-")[:64] or "key"


def _import_keys() -> "ModuleType":
    """Import signing.keys.

    Raises:
        MissingPackageError: cryptography is not installed.
    """
    with require("signing"):
        from chexnet_deploy.bundle.signing import keys
    return keys
