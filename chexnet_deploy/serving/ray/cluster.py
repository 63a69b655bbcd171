"""Images -> rows of a table, by a Ray cluster: in order, none lost and none twice.

Ray Data hands blocks of places to workers and takes their rows back in the images' order. Rows reach the table on the machine
that was asked for it and nowhere else, one after the other, each checked to be the next one: a table made by a cluster is
begun, gone on with and finished by the same code as any other (table_file.py). A worker that dies loses its block alone, which
another one carries again; a block that ends worker after worker is an error, and not tried for ever.

Every machine of the cluster sees bundle and images under the same paths, and has the same versions installed; see worker.py.
"""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL, ERROR, getLogger
from pathlib import Path
from typing import Final

# Ray reports its use to its maker, unless told not to before it starts. A hospital does not call home.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import pyarrow as pa
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from chexnet_deploy.bundle import Bundle, Trust
from chexnet_deploy.errors import ChexnetError, ClusterError
from chexnet_deploy.images.listing import ImageFiles
from chexnet_deploy.runtime.streaming import iter_lists, usable_cores
from chexnet_deploy.runtime.table import Row, TableCard
from chexnet_deploy.serving.ray.worker import BLOCK, Attempts, Job, Worker, package_versions

OBJECT_STORE_BYTES: Final = 2**28  # names and rows alone pass through it: a million take less
# A block's last images leave threads idle. With sixteen batches for each thread that is a thirtieth of its time, and what a
# dying worker loses is still seconds.
BATCHES_PER_THREAD: Final = 16


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

    def rows(self, bundle: Bundle, images: ImageFiles, card: TableCard, places: Sequence[int]) -> Generator[Row]:
        """Yield the rows of the images at some places, in their order; each batch is there as a whole.

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
                versions=package_versions(),
            )  # fmt: skip
            flow = job.flow(bundle)
            blocks = _blocks(images.names, places, flow.batch_size * flow.workers * BATCHES_PER_THREAD)
            n_done = 0
            for block in _answers(job, blocks, workers=workers, needs_gpu=needs_gpu):
                for at, line, is_quarantined in zip(*(column.to_pylist() for column in block.columns), strict=True):
                    if [at] != list(places[n_done : n_done + 1]):
                        raise ClusterError(
                            f"the cluster answered image {at:,} out of turn. Rows that are done are kept: run the same "
                            f"command again."
                        )
                    yield Row(line, is_quarantined)
                    n_done += 1
            if n_done != len(places):
                raise ClusterError(
                    f"the cluster ended after {n_done:,} of {len(places):,} images. Run the same command again."
                )


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
    context.raise_original_map_exception = True
    getLogger("ray.data").setLevel(CRITICAL)  # what goes wrong is raised, and needs no second telling
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
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


def _blocks(names: Sequence[str], places: Sequence[int], n: int) -> Iterator[pa.Table]:
    for block in iter_lists(places, n):
        # As bytes: a name on a disk need not be text.
        yield pa.table({"place": block, "name": [os.fsencode(names[place]) for place in block]}, schema=BLOCK)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        raise ClusterError("this process is in a Ray cluster already. Run predict in one of its own.")
    if address is None and os.environ.get("RAY_AUTH_MODE") != "token":
        # Who reaches a cluster's ports can run code in it, and Ray listens on all of the machine's networks.
        raise ClusterError(
            "a cluster started here would be open to whoever reaches this machine. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to "
            "64 random hexadecimal digits before ray is imported, as chexnet-deploy predict does."
        )
    try:
        if address is None:
            ray.init(
                "local",
                num_cpus=usable_cores(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
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
    except ExecutionTimeoutError as err:
        raise ClusterError(
            "no worker answered for a long time: none may have room, or all hang. Rows that are done are kept: look at "
            "`ray status`, then run the same command again."
        ) from err
    except ray.exceptions.RayError as err:
        cause = getattr(err, "cause", None)
        if isinstance(cause, ChexnetError):
            raise type(cause)(str(cause).splitlines()[0]) from err  # Ray adds lines about its own settings
        if isinstance(err, ray.exceptions.RayTaskError):
            raise  # a bug: its traceback is wanted
        raise ClusterError(
            f"the Ray cluster failed: {err}. Rows that are done are kept: run the same command again."
        ) from err
