"""What `chexnet-deploy serve` does: listen, prove the bundle, answer until SIGTERM; SIGHUP takes the bundle that lies there now."""

import asyncio
import contextlib
import logging
import math
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn

from chexnet_deploy.errors import ServeError
from chexnet_deploy.serving.http.app import make_app
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.serving.http.limits import IDLE_S
from chexnet_deploy.serving.http.service import Service

log = logging.getLogger("chexnet_deploy.serving")

_MAX_HEADER_BYTES: Final = 16_384
_BACKLOG: Final = 1024
_OTHER_FILES: Final = 64  # descriptors beside the connections'


def serve(config: ServeConfig) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code.

    Raises:
        ServeError: the address can't be had, or there are too few file descriptors.
        BundleError, TrustError, SessionError, MissingPackageError: the bundle can't be opened, or doesn't prove itself.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < config.max_connections + _OTHER_FILES:
        raise ServeError(
            f"this process may open {soft} files, {config.max_connections + _OTHER_FILES} are needed for "
            f"{config.max_connections} connections. Raise the limit (ulimit -n), or give --max-connections."
        )
    with _listen(config) as listener:
        asyncio.run(_serve(config, listener))
    return 0


@contextmanager
def _listen(config: ServeConfig) -> Iterator[socket.socket]:
    # The protocol is named because asyncio sends at once (TCP_NODELAY) only on sockets that name it: without, each answer's
    # body waits about 40 ms for the client's acknowledgement of its header (Nagle's algorithm, RFC 896).
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        yield listener
    except OSError as err:
        raise ServeError(
            f"can't listen on {config.host} port {config.port}: {err.strerror}. Give --host and --port of this machine "
            f"that no other program has."
        ) from err
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """Uvicorn's, without its signal handlers: it would end the process by the signal instead of with an exit code."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _make_server(config: ServeConfig, service: Service) -> _Server:
    return _Server(
        uvicorn.Config(
            make_app(service),
            http=service.guard.protocol(),
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,  # it quotes exceptions, and an exception may quote a request; app.py logs its own
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=math.ceil(config.drain_s),
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
    )


async def _serve(config: ServeConfig, listener: socket.socket) -> None:
    service = Service(config)
    server = _make_server(config, service)
    swaps: set[asyncio.Task[bool]] = set()

    def stop() -> None:
        log.info("draining")
        service.drain()
        server.force_exit = server.should_exit  # the second signal doesn't wait
        server.should_exit = True

    def swap() -> None:
        task = asyncio.ensure_future(service.swap())
        swaps.add(task)
        task.add_done_callback(swaps.discard)

    loop = asyncio.get_running_loop()
    for number, handler in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, swap)):
        loop.add_signal_handler(number, handler)
    watching = asyncio.ensure_future(service.guard.watch())
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    starting = asyncio.ensure_future(service.start())
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and starting.exception() is not None:
            stop()
        await serving
        await starting
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await asyncio.gather(*swaps)
        await service.close()
