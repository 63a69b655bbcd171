"""What a service may use and how long it may take: read once, checked here, frozen."""

from dataclasses import dataclass
from pathlib import Path
from re import fullmatch
from typing import Final

from chexnet_deploy.errors import ServeError
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.runtime.sessions.open import SELF_TEST_EVERY_S

MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """One service on one bundle.

    Attributes:
        bundle: its directory, or a link to it; read again at each swap.
        host: address to listen on; the service has no passwords and no TLS, so anything but loopback wants a proxy in front.
        port: 0 takes a free one.
        name: of the model in URLs.
        trust: trust file, read again at each swap; None checks hashes alone.
        provider: what runs an ONNX bundle.
        threads: CPU threads for one call; None takes all cores.
        max_batch: images that one request may hold, and that are run as one batch.
        window_ms: how long a busy lane waits for more images to fill a batch; an idle one never waits.
        queue_images: admitted and not answered yet; beyond it requests get 503.
        deadline_s: from admission to the start of inference; what waits longer is dropped before it.
        decoders: images decoded at once.
        max_body_mib: of one request, counted after inflating.
        max_held_mib: request bodies held in memory, all together.
        max_connections: open at once; beyond it one that makes no progress gives way.
        receive_s: from a request's first byte, or connecting, to its last.
        answer_s: from a request's last byte to its answer's last.
        drain_s: after SIGTERM, for what was admitted.
        saturation_s: between two images whose int8 activations are looked at; 0 for never.
        self_test_s: between two times that the engine is asked for its known answers, as the node's health.self_test_every_s;
            0 for never.
        shadow_images: the newest images kept in memory for the comparison before a swap; 0 keeps none.
        swap_tolerance: largest |probability difference| to the running engine that a swap allows.
    """

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = "chexnet"
    trust: Path | None = None
    provider: Provider = "auto"
    threads: int | None = None
    max_batch: int = 16
    window_ms: float = 0.0
    queue_images: int = 64
    deadline_s: float = 5.0
    decoders: int = 2
    max_body_mib: int = 64
    max_held_mib: int = 512
    max_connections: int = 512
    receive_s: float = 10.0
    answer_s: float = 30.0
    drain_s: float = 20.0
    saturation_s: float = 10.0
    self_test_s: float = SELF_TEST_EVERY_S
    shadow_images: int = 16
    swap_tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not fullmatch(r"[A-Za-z0-9._-]{1,64}", self.name):
            raise ServeError(f"--name {self.name!a}: needed 1 to 64 letters, digits, dots, dashes and underscores.")
        for name, low, high in (
            ("port", 0, 65535),
            ("max_batch", 1, 256),
            ("window_ms", 0.0, 1000.0),
            ("queue_images", 1, 100_000),
            ("deadline_s", 0.01, 3600.0),
            ("decoders", 1, 64),
            ("max_body_mib", 1, 512),
            ("max_held_mib", 1, 1_048_576),
            ("max_connections", 8, 100_000),
            ("receive_s", 0.1, 3600.0),
            ("answer_s", 0.1, 3600.0),
            ("drain_s", 0.0, 3600.0),
            ("saturation_s", 0.0, 86_400.0),
            ("self_test_s", 0.0, 86_400.0),
            ("shadow_images", 0, 1000),
            ("swap_tolerance", 0.0, 1.0),
        ):
            if not low <= getattr(self, name) <= high:  # NaN fails both comparisons
                raise ServeError(f"--{name.replace('_', '-')} {getattr(self, name)}: needed {low} to {high}.")
        if self.max_batch > self.queue_images:
            raise ServeError(
                f"--queue {self.queue_images} is less than --max-batch {self.max_batch}: such a batch could never be "
                f"admitted. Give a longer queue or a smaller batch."
            )
        if self.max_body_mib > self.max_held_mib:
            raise ServeError(
                f"--max-held-mib {self.max_held_mib} is less than --max-body-mib {self.max_body_mib}: such a body could "
                f"never be held. Give more of the first or less of the second."
            )

    @property
    def max_body_bytes(self) -> int:
        """Of one request, counted after inflating."""
        return self.max_body_mib * MIB
