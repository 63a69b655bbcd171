"""Bundle -> session: the only place that chooses a backend. Checks the known answers first, and writes nothing."""

import importlib.util
from typing import get_args

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.probe import Probe
from chexnet_deploy.errors import MissingPackageError, SessionError
from chexnet_deploy.runtime.sessions.base import BATCH_SIZE, Provider, Session, run_in_batches
from chexnet_deploy.runtime.sessions.here import what_it_runs_on
from chexnet_deploy.runtime.sessions.known_answers import N_STARTUP_PROBES, KnownAnswers

SELF_TEST_EVERY_S = 15.0  # so often the node and the service ask for them again, unless told otherwise


def open_session(
    bundle: Bundle, *, threads: int | None = None, provider: Provider = "auto", lanes: int = 1, device: int = 0
) -> Session:
    """Load a bundle on the backend it was made for and check its known answers.

    Args:
        bundle: verified. Where its release should become the oldest that runs here, call `bundle.keep_release()` next.
        threads: CPU threads for one call, for ONNX bundles; None takes all cores.
        provider: what runs an ONNX bundle; never another one in its place.
        lanes: calls that a plan answers at a time; each takes a stream and memory of its own.
        device: the GPU's number, for plans.

    Raises:
        MissingPackageError: the backend is not installed.
        TrustError: the bundle was opened with a trust that asks for a PASS, and has it on another machine.
        SessionError: no provider has that name or it can't be had here, the plan is for another machine, the backend refuses
            the model, or it answers otherwise than when the bundle was made.
    """
    provider = resolve_provider(provider)
    if bundle.attestation is not None:
        bundle.attestation.refuse_elsewhere(what_it_runs_on(bundle, provider, device), str(bundle.path))
    known = KnownAnswers.of(bundle)
    session: Session
    at_once = 1  # a backend on ONNX asks for a batch's itself, before the first one
    if bundle.manifest.target is not None:
        from chexnet_deploy.runtime.sessions.trt import TrtSession

        session, at_once = TrtSession.open(bundle, lanes=lanes, device=device), BATCH_SIZE
    else:
        session = _open_onnx(bundle, threads, provider, known)
    try:
        known.check(lambda pixels: run_in_batches(session, pixels, at_once=at_once))
    except BaseException:
        session.close()
        raise
    return session


def resolve_provider(provider: Provider) -> Provider:
    """Return what `provider` means here: "auto" is OpenVINO where it is installed, and else ONNX Runtime on the CPU.

    Raises:
        SessionError: no provider has that name.
    """
    if provider not in get_args(Provider):
        raise SessionError(f"no provider is named {provider!r}. Needed: one of {', '.join(get_args(Provider))}.")
    if provider != "auto":
        return provider
    return "cpu" if importlib.util.find_spec("openvino") is None else "openvino"


def _open_onnx(bundle: Bundle, threads: int | None, provider: Provider, known: KnownAnswers) -> Session:
    if provider == "openvino":
        try:
            from chexnet_deploy.runtime.sessions.openvino import OpenvinoSession
        except ModuleNotFoundError as err:
            raise MissingPackageError("openvino is not installed. Run: pip install 'chexnet-deploy[openvino]'") from err
        return OpenvinoSession.open(bundle, threads=threads, known=known)
    try:
        from chexnet_deploy.runtime.sessions.ort import OrtSession
    except ModuleNotFoundError as err:
        raise MissingPackageError(
            "neither openvino nor onnxruntime is installed. Run: pip install 'chexnet-deploy[cpu]'"
        ) from err
    return OrtSession.open(bundle, threads=threads, provider=provider, known=known)


def check_known_answers(
    session: Session,
    bundle: Bundle,
    *,
    n_probes: int = N_STARTUP_PROBES,
    probe: Probe | None = None,
    at_once: int = BATCH_SIZE,
) -> float:
    """Run the first probes and return the largest |logit difference| to the fp32 model's answers.

    Args:
        session: open.
        bundle: it was opened from.
        n_probes: how many.
        probe: see KnownAnswers.of.
        at_once: images in one batch at the most, as the session is used for.

    Raises:
        SessionError: the answers differ by more than when the bundle was kept, or maps and logits disagree.
    """
    known = KnownAnswers.of(bundle, n_probes=n_probes, probe=probe)
    return known.check(lambda pixels: run_in_batches(session, pixels, at_once=at_once))
