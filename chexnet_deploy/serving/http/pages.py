"""What a browser and a monitor read: the page, the API's description, the engine's identity, the metrics."""

from functools import lru_cache
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chexnet_deploy.serving.http import metrics as metrics_room
from chexnet_deploy.serving.http.openapi import describe_api
from chexnet_deploy.serving.http.predict import describe_points
from chexnet_deploy.serving.http.refusals import Fault, RequestError
from chexnet_deploy.serving.http.service import Service

_TYPES: Final = {
    "index.html": "text/html; charset=utf-8",
    "docs.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "docs.js": "text/javascript; charset=utf-8",
}
# Nothing from anywhere else, no script in a document, no frame around it.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@lru_cache(maxsize=len(_TYPES))
def _read(name: str) -> bytes:
    return files("chexnet_deploy.serving.http").joinpath("page").joinpath(name).read_bytes()


def _file(name: str) -> Response:
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Content-Type": _TYPES[name]}
    return Response(_read(name), headers=headers)


async def page(_service: Service, _request: Request) -> Response:
    """Return the page that radiographs are dropped on."""
    return _file("index.html")


async def docs(_service: Service, _request: Request) -> Response:
    """Return the page that shows the API's description."""
    return _file("docs.html")


async def asset(_service: Service, request: Request) -> Response:
    """Return a part of a page.

    Raises:
        RequestError: 404.
    """
    name = request.path_params["name"]
    if name not in _TYPES:
        raise RequestError(404, Fault.NOT_FOUND, "There is no such file.")
    return _file(name)


async def openapi(service: Service, _request: Request) -> Response:
    """Return the API's description (OpenAPI 3.1)."""
    return JSONResponse(describe_api(service.config.name))


async def metrics(service: Service, _request: Request) -> Response:
    """Return the metrics in Prometheus' format."""
    return Response(service.metrics_text(), headers={"Content-Type": metrics_room.CONTENT_TYPE})


async def engine(service: Service, _request: Request) -> Response:
    """Return who the engine is and what was proven of it, from its manifest."""
    with service.use_engine() as running:
        manifest = running.bundle.manifest
        facts = {
            "model": service.config.name,
            "bundle": running.bundle.id,
            "version": running.version,
            "precision": running.precision,
            "dialect": manifest.dialect,
            "backend": running.backend,
            "resize_px": manifest.preprocessing.resize_px,
            "findings": list(manifest.findings),
            **describe_points(running.points),
            "site": running.points.site,
            "checks": [check.model_dump() for check in manifest.checks],
            "probe_max_abs_logit_error": manifest.probe_max_abs_logit_error,
            "checkpoint_sha256": manifest.checkpoint_sha256,
            "ancestors": list(manifest.ancestors),
            "calibration": None if manifest.calibration is None else manifest.calibration.model_dump(),
            "release": None if manifest.release is None else manifest.release.model_dump(),
            "signers": list(running.bundle.signers),
            "tools": dict(manifest.tools),
            "batching": {"sizes": list(running.plan.sizes), "is_invariant": running.plan.is_invariant},
        }
    return JSONResponse(facts)
