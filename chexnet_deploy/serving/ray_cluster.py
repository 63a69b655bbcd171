"""Images -> rows of a table, by a Ray cluster: one Predictor a worker, blocks in order, and no row lost or twice. The ray room.

Ray Data hands blocks of places to workers and takes their rows back in the images' order. Rows reach the table on the machine
that was asked for it and nowhere else, one after the other, each checked to be the next one: a table made by a cluster is
begun, gone on with and finished by the same code as any other (results.py). A worker that dies loses its block alone, which
another one carries again; a block that ends worker after worker is an error, and not tried for ever.

Every machine of the cluster sees bundle and images under the same paths, and has the same versions installed; each worker
verifies the bundle, its signature and its known answers for itself.
"""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Final, cast

# Ray reports its use to its maker, unless told not to before it starts. A hospital does not call home.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import pyarrow as pa
import ray
import ray.data

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.errors import BundleError, ChexnetError, ClusterError, ImageError
from chexnet_deploy.image_files import ImageFiles
from chexnet_deploy.predictor import Predictor
from chexnet_deploy.sessions import Provider, open_session
from chexnet_deploy.signing.trust import Trust
from chexnet_deploy.streaming import Flow, choose_flow, iter_lists, usable_cores
from chexnet_deploy.table_rows import Row, TableCard, row_bytes

OBJECT_STORE_BYTES: Final = 2**28  # names and rows alone pass through it: a million take less
MAX_ATTEMPTS: Final = 3
# A block's last images leave threads idle. With sixteen batches for each thread that is a thirtieth of its time, and what a
# dying worker loses is still seconds.
BATCHES_PER_THREAD: Final = 16
# What an answer's bits depend on, beside the processor.
_PACKAGES: Final = ("chexnet-deploy", "numpy", "pillow", "pydicom", "onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the work is done.

    Attributes:
        address: of a running cluster as ray.init takes it, e.g. "auto" or "10.0.0.1:6379"; None starts one here, which ends
            with the work.
        workers: how many; None for one a machine, or one a GPU where the bundle needs one.
        trust: whose signature every worker asks of the bundle; see Bundle.open.
    """

    address: str | None = None
    workers: int | None = None
    trust: Trust | None = None

    def rows(self, bundle: Bundle, images: ImageFiles, card: TableCard, start: int) -> Generator[Row]:
        """Yield each image's row in order, from the one at place `start` on, which is where a batch begins.

        Raises:
            ClusterError: no cluster, too few cores or GPUs for the workers, a worker that differs from this machine, or
                images that ended worker after worker.
            ChexnetError: what Predictor.open raises, on a worker.
        """
        needs_gpu = bundle.manifest.engine is not None or card.backend == "cuda"
        with _connected(self.address), _translated():
            workers, cores = fit_workers(_nodes(), self.workers, needs_gpu=needs_gpu)
            job = Job(
                folder=Path.cwd(), bundle=bundle.path, root=images.root, trust=self.trust, card=card, cores=cores,
                versions=_versions(),
            )  # fmt: skip
            flow = job.flow(bundle)
            blocks = _blocks(images.names, start, flow.batch_size * flow.workers * BATCHES_PER_THREAD)
            place = start
            for block in _answers(job, blocks, workers=workers, needs_gpu=needs_gpu):
                for at, line, is_quarantined in zip(*(column.to_pylist() for column in block.columns), strict=True):
                    if at != place:
                        raise ClusterError(
                            f"the cluster answered image {at:,} where {place:,} was next. Rows that are done are kept: run "
                            f"the same command again."
                        )
                    yield Row(line, is_quarantined)
                    place += 1
            if place != card.n_images:
                raise ClusterError(
                    f"the cluster ended after {place:,} of {card.n_images:,} images. Run the same command again."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker is told.

    Attributes:
        folder: that all paths are relative to.
        bundle: the bundle's path.
        root: see ImageFiles.
        trust: see Bundle.open.
        card: of the table.
        cores: of this worker.
        versions: of the packages that the table's bits depend on, by name.
    """

    folder: Path
    bundle: Path
    root: Path
    trust: Trust | None
    card: TableCard
    cores: int
    versions: Mapping[str, str]

    @property
    def provider(self) -> Provider:
        """What runs an ONNX bundle; never "auto", which may be another one on another machine."""
        return cast(Provider, self.card.backend) if self.card.backend in ("openvino", "cpu", "cuda") else "auto"

    def flow(self, bundle: Bundle) -> Flow:
        """Return how images move through one worker."""
        return choose_flow(bundle.manifest, threads=self.card.threads, provider=self.provider, cores=self.cores)


class Worker:
    """One Predictor on one machine of the cluster; opened for the first block, where an error reaches the user.

    Args:
        job: what to do.
        attempts: an _Attempts actor.
    """

    def __init__(self, job: Job, attempts: Any) -> None:
        self._job = job
        self._attempts = attempts
        self._predictor: Predictor | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return place, row and whether it is quarantined, for each place and name of a block."""
        places = block["place"].to_pylist()
        if ray.get(self._attempts.begin.remote(places[0])) > MAX_ATTEMPTS:
            raise ClusterError(
                f"{MAX_ATTEMPTS} workers ended while they carried images {places[0]:,} to {places[-1]:,} of the list. Rows "
                f"that are done are kept. Look for a damaged file among them, or for too little memory."
            )
        if self._predictor is None:
            self._predictor = self._open()
        names = [os.fsdecode(name) for name in block["name"].to_pylist()]
        lines, are_quarantined = [], []
        for name, (path, answer) in zip(
            names, self._predictor.predict_stream(self._job.root / name for name in names), strict=True
        ):
            lines.append(row_bytes(self._job.card, name, path, answer))
            are_quarantined.append(isinstance(answer, ImageError))
        self._attempts.end.remote(places[0])
        return pa.table({"place": block["place"], "line": lines, "quarantined": are_quarantined}, schema=_ANSWERS)

    def _open(self) -> Predictor:
        job = self._job
        found = _versions()
        for name, needed in job.versions.items():
            if found.get(name) != needed:
                raise ClusterError(
                    f"a machine of the cluster has {name} {found.get(name)}, the one that asks has {needed}; their answers may "
                    f"differ. Install the same on all."
                )
        try:
            os.chdir(job.folder)
        except OSError as err:
            raise ClusterError(
                f"{job.folder}: {err.strerror} on a machine of the cluster. All need the same files under the same paths."
            ) from err
        bundle = Bundle.open(job.bundle, trust=job.trust)
        if bundle.id != job.card.bundle:
            raise BundleError(
                f"{job.bundle} is another bundle on a machine of the cluster: {bundle.id[:12]}…, not "
                f"{job.card.bundle[:12]}…. Copy it there again."
            )
        session = open_session(bundle, threads=job.card.threads, provider=job.provider)
        return Predictor(session, bundle.manifest, job.flow(bundle))


class _Attempts:
    """How often each block was begun and not ended. One in the cluster."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}

    def begin(self, place: int) -> int:
        self._begun[place] = self._begun.get(place, 0) + 1
        return self._begun[place]

    def end(self, place: int) -> None:
        self._begun.pop(place, None)


_BLOCK: Final = pa.schema({"place": pa.int64(), "name": pa.binary()})
_ANSWERS: Final = pa.schema({"place": pa.int64(), "line": pa.binary(), "quarantined": pa.bool_()})


def fit_workers(nodes: Sequence[Mapping[str, float]], workers: int | None, *, needs_gpu: bool) -> tuple[int, int]:
    """Return how many workers there are, and the cores each has: as many as leave room for all of them.

    Args:
        nodes: each machine's "CPU" and "GPU".
        workers: how many are asked for; None for one a machine, or one a GPU.
        needs_gpu: each takes a GPU of its own.

    Raises:
        ClusterError: so many don't fit.
    """

    def fitting(cores: int) -> int:
        rooms = ((int(node.get("CPU", 0)) // cores, int(node.get("GPU", 0))) for node in nodes)
        return sum(min(room) if needs_gpu else room[0] for room in rooms)

    whole = sum(int(node.get("GPU", 0)) if needs_gpu else int(node.get("CPU", 0) >= 1) for node in nodes)
    wanted = whole if workers is None else workers
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    cores = next((cores for cores in range(most, 0, -1) if fitting(cores) >= wanted), 0)
    if wanted < 1 or cores < 1:
        found = f"{sum(int(node.get('CPU', 0)) for node in nodes)} cores"
        found += f" and {sum(int(node.get('GPU', 0)) for node in nodes)} GPUs" if needs_gpu else ""
        needed = f"{max(1, wanted)} workers need a core{' and a GPU' if needs_gpu else ''} each"
        raise ClusterError(f"the cluster has {found}; {needed}. Ask for fewer, or add machines.")
    return wanted, cores


def _answers(job: Job, blocks: Iterator[pa.Table], *, workers: int, needs_gpu: bool) -> Iterator[pa.Table]:
    """Yield each block's answers, in the blocks' order, while workers carry the next ones."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    getLogger("ray.data").setLevel(ERROR)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
    answered = ray.data.from_arrow(list(blocks)).map_batches(
        Worker,
        fn_constructor_args=(job, attempts),
        batch_size=None,  # a block is carried whole
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=job.cores,
        num_gpus=1 if needs_gpu else None,
    )
    yield from answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _blocks(names: Sequence[str], start: int, n: int) -> Iterator[pa.Table]:
    for places in iter_lists(range(start, len(names)), n):
        # As bytes: a name on a disk need not be text.
        yield pa.table({"place": places, "name": [os.fsencode(names[place]) for place in places]}, schema=_BLOCK)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        raise ClusterError("this process is in a Ray cluster already. Run predict in one of its own.")
    try:
        if address is None:
            ray.init(
                "local",
                num_cpus=usable_cores(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                # Who reaches a cluster's ports can run code in it: none but this machine's own users.
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=ERROR,
            )
        else:
            ray.init(address, log_to_driver=False, logging_level=ERROR)
    except Exception as err:  # bare ones, where Ray's processes don't come up
        found, remedy = (
            ("could be started here", "Close what keeps this machine busy")
            if address is None
            else (f"answers at {address}", "Check the address")
        )
        raise ClusterError(f"no Ray cluster {found}: {err} {remedy}, then run the same command again.") from err
    try:
        yield
    finally:
        ray.shutdown()


def _nodes() -> list[Mapping[str, float]]:
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what a worker raised as if it had been raised here, and what Ray itself raises as a ClusterError."""
    try:
        yield
    except ray.exceptions.RayError as err:
        cause = getattr(err, "cause", None)
        if isinstance(cause, ChexnetError):
            raise cause from err
        if isinstance(err, ray.exceptions.RayTaskError):
            raise  # a bug: its traceback is wanted
        raise ClusterError(
            f"the Ray cluster failed: {err}. Rows that are done are kept: run the same command again."
        ) from err


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
