"""The Open Inference Protocol's routes (KServe v2): health, metadata and inference.

Shared memory and control of the model are not offered: which bundle runs is decided where the service runs.
"""

from time import monotonic
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chexnet_deploy import __version__
from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.serving.http.loaded_model import Engine
from chexnet_deploy.serving.http.predict import inflate, read_body
from chexnet_deploy.serving.http.refusals import Fault, RequestError
from chexnet_deploy.serving.http.service import Service
from chexnet_deploy.serving.http.tensors import INPUT, Inference, max_request_bytes, parse_inference, render_inference

_LENGTH: Final = "Inference-Header-Content-Length"
_INLINE_BYTES: Final = (
    65_536  # JSON up to here is parsed at once; more goes to a thread, so that others don't wait for it
)


async def live(service: Service, _request: Request) -> Response:
    """Say whether the process can work at all."""
    why = {} if service.is_live else {"reason": "known-answers"}
    return JSONResponse({"live": service.is_live, **why}, 200 if service.is_live else 503)


async def ready(service: Service, _request: Request) -> Response:
    """Say whether images are answered now."""
    return JSONResponse(_readiness(service), 200 if service.is_ready else 503)


def _readiness(service: Service) -> dict[str, object]:
    why = service.why_not_ready
    return {"ready": True} if why is None else {"ready": False, "reason": why}


def _sizes(manifest: Manifest) -> tuple[int, int, int]:
    """Return the pixels' side, the number of findings and the maps' side."""
    side_px = manifest.preprocessing.resize_px
    return side_px, len(manifest.findings), side_px // 32


async def server(_service: Service, _request: Request) -> Response:
    """Name the server and the protocol's extensions it has."""
    extensions = ["binary_tensor_data", "model_configuration"]
    return JSONResponse({"name": "chexnet-deploy", "version": __version__, "extensions": extensions})


async def model(service: Service, request: Request) -> Response:
    """Describe the model's tensors."""
    with service.use_engine() as engine:
        _check_model(service, engine, request)
        side_px, n_findings, cells = _sizes(engine.bundle.manifest)
        described = {
            "name": service.config.name,
            "versions": [engine.version],
            "platform": f"chexnet_{engine.backend}",
            "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, 1, side_px, side_px]}],
            "outputs": [
                {"name": "logits", "datatype": "FP32", "shape": [-1, n_findings]},
                {"name": "cam", "datatype": "FP32", "shape": [-1, n_findings, cells, cells]},
            ],
        }
    return JSONResponse(described)


async def model_config(service: Service, request: Request) -> Response:
    """Describe the model's tensors and batches as Triton's model configuration extension does."""
    with service.use_engine() as engine:
        _check_model(service, engine, request)
        side_px, n_findings, cells = _sizes(engine.bundle.manifest)
        described = {
            "name": service.config.name,
            "platform": f"chexnet_{engine.backend}",
            "backend": engine.backend,
            "max_batch_size": service.config.max_batch,
            "input": [{"name": INPUT, "data_type": "TYPE_UINT8", "dims": [1, side_px, side_px]}],
            "output": [
                {"name": "logits", "data_type": "TYPE_FP32", "dims": [n_findings]},
                {"name": "cam", "data_type": "TYPE_FP32", "dims": [n_findings, cells, cells]},
            ],
            "dynamic_batching": {
                "preferred_batch_size": list(engine.plan.sizes),
                "max_queue_delay_microseconds": round(1000 * service.config.window_ms),
            },
        }
    return JSONResponse(described)


async def no_statistics(_service: Service, _request: Request) -> Response:
    """Refuse Triton's statistics extension, and say where the statistics are.

    Raises:
        RequestError: 400, always.
    """
    raise RequestError(
        400,
        Fault.NOT_OFFERED,
        "Statistics are not offered here; /metrics has every count and time, in Prometheus' format.",
    )


async def model_ready(service: Service, request: Request) -> Response:
    """Say whether the model answers now."""
    with service.use_engine() as engine:
        _check_model(service, engine, request)
    answer = {"name": service.config.name, **_readiness(service)}
    return JSONResponse(answer, 200 if service.is_ready else 503)


async def infer(service: Service, request: Request) -> Response:
    """Run pixels.

    Raises:
        RequestError: 400, 404, 413, 415, 503; 500 where the engine fails.
    """
    began_s = monotonic()
    with service.use_engine() as engine:
        _check_model(service, engine, request)
        limit_bytes = _limit_bytes(service, engine)
        body = await read_body(request, service.guard, limit_bytes)
        service.metrics.stage.labels("read").observe(monotonic() - began_s)
        deadline_s = monotonic() + service.config.deadline_s
        asked = await _parse(service, engine, request, body, deadline_s)
        if asked.timeout_s is not None:
            deadline_s = min(deadline_s, monotonic() + asked.timeout_s)
        with service.admission.admit(len(asked.pixels)):
            answer = await service.infer(engine, asked.pixels, deadline_s)
        facts = {
            "model_name": service.config.name,
            "model_version": engine.version,
            "parameters": {"bundle": engine.bundle.id, "precision": engine.precision},
        }
        content, length = render_inference(asked, {"logits": answer.logits, "cam": answer.maps}, facts)
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={_LENGTH: str(length)})


async def not_offered(_service: Service, _request: Request) -> Response:
    """Refuse what the protocol knows and this service doesn't do.

    Raises:
        RequestError: 400, always.
    """
    raise RequestError(
        400,
        Fault.NOT_OFFERED,
        "Shared memory, model control, tracing and log settings are not offered. Which bundle runs is decided where the "
        "service runs.",
    )


async def _parse(service: Service, engine: Engine, request: Request, body: bytes, deadline_s: float) -> Inference:
    length, encoding = request.headers.get(_LENGTH), request.headers.get("content-encoding")
    side_px = engine.bundle.manifest.preprocessing.resize_px
    limit_bytes = _limit_bytes(service, engine)

    def parse() -> Inference:
        began_s = monotonic()
        asked = parse_inference(inflate(body, encoding, limit_bytes), length, side_px, service.config.max_batch)
        service.metrics.stage.labels("preprocess").observe(monotonic() - began_s)
        return asked

    is_quick = encoding is None and (length is not None or len(body) <= _INLINE_BYTES)
    return parse() if is_quick else await service.work(parse, deadline_s)


def _limit_bytes(service: Service, engine: Engine) -> int:
    side_px = engine.bundle.manifest.preprocessing.resize_px
    return min(service.config.max_body_bytes, max_request_bytes(side_px, service.config.max_batch))


def _check_model(service: Service, engine: Engine, request: Request) -> None:
    if request.path_params["model"] != service.config.name:
        raise RequestError(404, Fault.NOT_FOUND, f"There is one model here: {service.config.name}.")
    if request.path_params.get("version", engine.version) != engine.version:
        raise RequestError(404, Fault.NOT_FOUND, f"There is one version here: {engine.version}.")
