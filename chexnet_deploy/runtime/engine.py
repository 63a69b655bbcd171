"""An engine: images in, logits out, with its findings and its preprocessing. A bundle is one; so is anyone's model by a contract.

`bench` and `evaluate` know engines alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from chexnet_deploy.bundle.bundle import MAX_MODEL_BYTES, Bundle
from chexnet_deploy.bundle.probe import draw_probe_pixels
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.errors import SessionError, SpecError, TrustError
from chexnet_deploy.files import PlainFile, Sha256, sha256_hex
from chexnet_deploy.images import Pixels, Resizing
from chexnet_deploy.runtime.contract import Contract
from chexnet_deploy.runtime.sessions.base import Provider, Session
from chexnet_deploy.runtime.sessions.endpoint import EndpointTransport, split_url
from chexnet_deploy.runtime.sessions.foreign import ForeignSession, OnnxTransport
from chexnet_deploy.runtime.sessions.known_answers import N_STARTUP_PROBES
from chexnet_deploy.runtime.sessions.open import open_session

_SCHEMES: Final = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class ForeignModel:
    """A model that isn't a bundle: an ONNX file, or an Open Inference Protocol endpoint.

    Attributes:
        place: the file, or the URL.
        contract: what it takes and answers.
        model: the file's bytes; None for an endpoint.
    """

    place: Path | str
    contract: Contract
    model: bytes | None

    @property
    def name(self) -> str:
        """The file's name without its suffix, or the endpoint's model."""
        return self.place.stem if isinstance(self.place, Path) else split_url(self.place)[2]

    @property
    def model_sha256(self) -> Sha256 | None:
        """Of the file; None for an endpoint, behind which anything may run."""
        return None if self.model is None else sha256_hex(self.model)

    @property
    def id(self) -> Sha256:
        """SHA-256 of the contract with the file's SHA-256, or with the URL."""
        what = {"contract": self.contract.model_dump(mode="json"), "model": self.model_sha256 or str(self.place)}
        return sha256_hex(json.dumps(what, sort_keys=True).encode())

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the logits, in order."""
        return self.contract.findings

    @property
    def operating_points(self) -> Mapping[str, float]:
        """See Contract."""
        return self.contract.operating_points


Engine: TypeAlias = Bundle | ForeignModel


def find_engine(place: Path | str, contract: Contract | None, *, trust: Trust | None = None) -> Engine:
    """Return what a path or a URL names: a folder is a bundle, a file an ONNX model, a URL an endpoint.

    Args:
        place: where.
        contract: of what is no bundle; a bundle has no use for it.
        trust: what a bundle must show.

    Raises:
        BundleError, TrustError: see Bundle.open.
        TrustError: trust is asked for what nobody can sign.
        SpecError: no contract, or the URL is none of a model.
        SessionError: the file can't be read.
    """
    is_url = str(place).startswith(_SCHEMES)
    path = Path(place)
    if not is_url and path.suffix != ".onnx" and not path.is_file():
        return Bundle.open(path, trust=trust)
    if trust is not None:
        raise TrustError(
            f"found --trust and {place}, which is no bundle and can't be signed. Omit --trust, or give bundles."
        )
    if contract is None and path.suffix == ".safetensors":
        raise SpecError(f"found {place}, a checkpoint; needed a bundle. Run `chexnet-deploy export {place}` first.")
    if contract is None:
        raise SpecError(
            f"found {place}, which is no bundle, and no contract; needed a TOML that says what it takes and answers. "
            f"Give it by --contract; docs/foreign-models.md has its fields."
        )
    if is_url:
        split_url(str(place))
        return ForeignModel(str(place), contract, None)
    file = PlainFile(
        path=path,
        limit_bytes=MAX_MODEL_BYTES,
        error=SessionError,
        next_step="Give a whole ONNX file, a bundle or an endpoint.",
        follows_links=True,
    )
    return ForeignModel(path, contract, file.read())


def refuse_idle_contract(path: Path | None, engines: Sequence[Engine]) -> None:
    """Refuse a contract that describes nobody.

    Raises:
        SpecError: all are bundles, which say for themselves what they take.
    """
    if path is not None and all(isinstance(engine, Bundle) for engine in engines):
        raise SpecError(f"found the contract {path} for bundles, which say what they take themselves. Omit it.")


def open_engine(engine: Engine, *, threads: int | None = None, provider: Provider = "auto") -> Session:
    """Load an engine; a bundle gives its known answers, anyone else's model the same answer twice.

    Args:
        engine: found.
        threads: CPU threads for one call; None takes all cores.
        provider: what runs an ONNX model; of a file that is no bundle "auto" is ONNX Runtime's CPU.

    Raises:
        MissingPackageError, SessionError: see open_session; or the model isn't its contract's, or answers otherwise when it is
            asked again.
    """
    if isinstance(engine, Bundle):
        return open_session(engine, threads=threads, provider=provider)
    if engine.model is None:
        session = ForeignSession(engine.contract, EndpointTransport(str(engine.place), engine.contract))
    else:
        if provider == "openvino":
            raise SessionError(
                f"{engine.place}: found --provider openvino; an ONNX file that is no bundle runs in ONNX Runtime. "
                f"Give --provider cpu or cuda."
            )
        transport = OnnxTransport(str(engine.place), engine.model, engine.contract, threads=threads, provider=provider)
        session = ForeignSession(engine.contract, transport)
    try:
        pixels = probe_pixels(engine)[:N_STARTUP_PROBES]
        session.check_again(pixels, session.run(pixels)[0])
    except BaseException:
        session.close()
        raise
    return session


def probe_pixels(engine: Engine) -> Pixels:
    """Return uint8 [32, 1, S, S] of drawn images: a bundle's own."""
    return engine.read_probe().pixels if isinstance(engine, Bundle) else draw_probe_pixels(engine.contract.input.size)


def resizing_of(engine: Engine) -> Resizing:
    """Return how a picture becomes the engine's pixels."""
    return engine.manifest.preprocessing if isinstance(engine, Bundle) else engine.contract.input.resizing
