"""Bundle -> session: the only place that chooses a backend. Checks the known answers first, and writes nothing."""

import importlib.util
from typing import get_args

import numpy as np

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.probe import Probe
from chexnet_deploy.errors import MissingPackageError, SessionError
from chexnet_deploy.runtime.sessions.base import Provider, Session, run_in_batches
from chexnet_deploy.runtime.sessions.here import what_it_runs_on

N_STARTUP_PROBES = 4  # enough to catch a wrong file or backend, few enough for a scanner's start-up
SELF_TEST_EVERY_S = 15.0  # so often the node and the service ask for them again, unless told otherwise
# What two machines may differ by beyond the error measured when the bundle was kept: other instruction sets round
# other ways. Fp32 logits of the same graph differ by about 1e-5 between AVX2 and AVX-512.
LOGIT_SLACK = 2e-3
CAM_IDENTITY_TOLERANCE = 1e-4


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
    session: Session
    if bundle.manifest.target is not None:
        from chexnet_deploy.runtime.sessions.trt import TrtSession

        session = TrtSession.open(bundle, lanes=lanes, device=device)
    else:
        session = _open_onnx(bundle, threads, provider)
    try:
        check_known_answers(session, bundle)
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


def _open_onnx(bundle: Bundle, threads: int | None, provider: Provider) -> Session:
    if provider == "openvino":
        try:
            from chexnet_deploy.runtime.sessions.openvino import OpenvinoSession
        except ModuleNotFoundError as err:
            raise MissingPackageError("openvino is not installed. Run: pip install 'chexnet-deploy[openvino]'") from err
        return OpenvinoSession.open(bundle, threads=threads)
    try:
        from chexnet_deploy.runtime.sessions.ort import OrtSession
    except ModuleNotFoundError as err:
        raise MissingPackageError(
            "neither openvino nor onnxruntime is installed. Run: pip install 'chexnet-deploy[cpu]'"
        ) from err
    return OrtSession.open(bundle, threads=threads, provider=provider)


def check_known_answers(
    session: Session, bundle: Bundle, *, n_probes: int = N_STARTUP_PROBES, probe: Probe | None = None
) -> float:
    """Run the first probes and return the largest |logit difference| to the fp32 model's answers.

    Args:
        session: open.
        bundle: it was opened from.
        n_probes: how many.
        probe: the bundle's, where it was read before; another bundle may lie at its path by now. None reads it.

    Raises:
        SessionError: the answers differ by more than when the bundle was kept, or maps and logits disagree.
    """
    manifest, probe = bundle.manifest, probe or bundle.read_probe()
    logits, maps = run_in_batches(session, probe.pixels[:n_probes])
    if logits.shape != probe.logits[:n_probes].shape or maps.shape != probe.cam[:n_probes].shape:
        raise SessionError(
            f"{bundle.path}: the model answers {logits.shape} and {maps.shape}, not as its manifest says."
        )
    error = float(np.abs(logits - probe.logits[:n_probes]).max())
    # Twice, because int8 rounds to another step when fp32 sums differ in the last bit.
    allowed = 2.0 * manifest.probe_max_abs_logit_error + LOGIT_SLACK
    if error > allowed:
        raise SessionError(
            f"{bundle.path}: known answers differ by {error:.4f} logits, {allowed:.4f} is allowed. "
            f"This backend does not run this model as it was proven; don't use it here. Run: chexnet-deploy doctor"
        )
    from_maps = maps.mean(axis=(2, 3), dtype=np.float64) + np.asarray(manifest.head_bias)
    gap = float((np.abs(from_maps - logits) / np.maximum(1.0, np.abs(logits))).max())
    if gap > CAM_IDENTITY_TOLERANCE:
        raise SessionError(f"{bundle.path}: maps and logits disagree by {gap:.1e}, 1e-4 is allowed. Export it again.")
    return error
