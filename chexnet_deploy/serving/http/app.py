"""The ASGI application: which path is answered by what, and what becomes of errors."""

import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chexnet_deploy.serving.http import inference as protocol
from chexnet_deploy.serving.http import pages
from chexnet_deploy.serving.http.limits import GuardedApp, Receive, Scope, Send
from chexnet_deploy.serving.http.predict import predict
from chexnet_deploy.serving.http.refusals import RETRY_AFTER_S, Fault, RequestError, busy
from chexnet_deploy.serving.http.service import Service

log = logging.getLogger("chexnet_deploy.serving")

Handler: TypeAlias = Callable[[Service, Request], Awaitable[Response]]

_MODEL: Final = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
_ALL: Final = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]


def make_app(service: Service) -> GuardedApp:
    """Return the application of one service."""
    routes: list[tuple[str, str, Handler]] = [
        ("/", "GET", pages.page),
        ("/page/{name}", "GET", pages.asset),
        ("/docs", "GET", pages.docs),
        ("/openapi.json", "GET", pages.openapi),
        ("/engine", "GET", pages.engine),
        ("/metrics", "GET", pages.metrics),
        ("/predict", "POST", predict),
        ("/v2", "GET", protocol.server),
        ("/v2/health/live", "GET", protocol.live),
        ("/v2/health/ready", "GET", protocol.ready),
    ]
    for path in _MODEL:
        routes += [
            (path, "GET", protocol.model),
            (f"{path}/config", "GET", protocol.model_config),
            (f"{path}/ready", "GET", protocol.model_ready),
            (f"{path}/infer", "POST", protocol.infer),
        ]
    starlette = Starlette(
        routes=[
            # Ahead of the model of that name, which there is none of.
            *(
                Route(path, _endpoint(service, path, protocol.no_statistics), methods=_ALL)
                for path in ("/v2/models/stats", *(f"{path}/stats" for path in _MODEL))
            ),
            *(Route(path, _endpoint(service, path, handler), methods=[method]) for path, method, handler in routes),
            *(
                Route(path, _endpoint(service, path, protocol.not_offered), methods=_ALL)
                for path in (
                    "/v2/repository/{rest:path}",
                    "/v2/systemsharedmemory{rest:path}",
                    "/v2/cudasharedmemory{rest:path}",
                    "/v2/trace/{rest:path}",
                    "/v2/logging",
                    *(f"{path}/trace/{{rest:path}}" for path in _MODEL),
                )
            ),
        ],
        exception_handlers={HTTPException: _routing_error(service)},
    )
    # "/v2/" is no path of ours, and a redirect would repeat what the client asked for.
    starlette.router.redirect_slashes = False
    return GuardedApp(_RefusesWhenFull(starlette, service), service.guard)


class _RefusesWhenFull:
    """Answer 503 ahead of everything else where no image would be admitted.

    At three times what the engine can do, two of three requests end here: what they cost is taken from the third.
    """

    def __init__(self, app: Starlette, service: Service) -> None:
        self._app, self._service = app, service
        self._max_bytes = service.config.max_body_bytes
        refusal = busy(Fault.BUSY, f"{service.config.queue_images} images wait, as many as may. Try again later.")
        self._response = _render(refusal)
        self._count_refusal = service.metrics.refusals.labels(refusal.reason.value).inc
        self._count_request = {
            path: service.metrics.requests.labels(route, str(refusal.status)).inc
            for path, route in (
                ("/predict", "/predict"),
                (f"/v2/models/{service.config.name}/infer", f"{_MODEL[0]}/infer"),
            )
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        count_request = self._count_request.get(scope["path"]) if scope["type"] == "http" else None
        if count_request is None or scope["method"] != "POST" or not self._service.admission.is_full:
            await self._app(scope, receive, send)
            return
        # The body is read and dropped: a client that is still sending often doesn't see an answer.
        message, n_bytes = await receive(), 0
        while message.get("more_body", False) and n_bytes <= self._max_bytes:
            n_bytes += len(message["body"])
            message = await receive()
        count_request()
        self._count_refusal()
        await self._response(scope, receive, send)


def _endpoint(service: Service, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            response = await handler(service, request)
        except RequestError as err:
            response = _refuse(service, err)
        except ClientDisconnect:
            # Nobody reads this.
            response = _refuse(service, RequestError(400, Fault.GONE, "The client went away."))
        except Exception as err:  # noqa: BLE001 - the service goes on, and says where it was
            # Where, and never what: a message may quote the request.
            frames = traceback.extract_tb(err.__traceback__)[-3:]
            where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
            log.error("%s failed: %s at %s", path, type(err).__name__, where)
            response = _refuse(service, RequestError(500, Fault.INTERNAL, "The service failed; see its log."))
        response.headers.update({name: value for name, value in _HEADERS.items() if name not in response.headers})
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return answer


def _routing_error(service: Service) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_request: Request, err: Exception) -> Response:
        assert isinstance(err, HTTPException)  # registered for it alone
        if err.status_code == 405:
            refusal = RequestError(405, Fault.METHOD, "This path takes another method; /openapi.json says which.")
        else:
            refusal = RequestError(404, Fault.NOT_FOUND, "There is no such path; /openapi.json names all.")
        response = _refuse(service, refusal)
        response.headers.update(err.headers or {})
        service.metrics.requests.labels("none", str(response.status_code)).inc()
        return response

    return answer


def _refuse(service: Service, err: RequestError) -> Response:
    service.metrics.refusals.labels(err.reason.value).inc()
    return _render(err)


def _render(err: RequestError) -> Response:
    headers = {**_HEADERS, "Retry-After": str(RETRY_AFTER_S)} if err.status == 503 else _HEADERS
    return JSONResponse({"error": str(err), "reason": err.reason.value}, err.status, headers)
