"""The engines that benchmarks/cpu/peers.py times, and the timing: in turns, so that all share the machine's moods."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final, TypeAlias

import numpy as np
import torch

from benchmarks.cpu.peers_models import ORT_FP32, ORT_INT8, OURS, PEERS_OPENVINO, Models, peer_model, session_of
from benchmarks.int8.accuracy import cores
from benchmarks.int8.recipes import StaticOpenvino
from chexnet_deploy.images.preprocessing import Pixels

BATCHES: Final = (1, 16)
# Of a batch of 16: whole on all threads, or in pieces on a stream for each thread; the faster one is timed.
_PIECES: Final = (16, 8, 4)
_TRIALS = 3
SETTLE_S: Final = 0.1
TORCH: Final = ("torch, eager", "torch, channels_last", "torch.compile")

Run: TypeAlias = Callable[[Pixels], object]


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, ready to run.

    Attributes:
        runs: by batch size; empty where it does not work here.
        note: how it runs, or why it does not.
    """

    name: str
    runs: Mapping[int, Run]
    note: str = ""


def open_engines(models: Models, *, openvino_only: bool) -> tuple[Engine, ...]:
    """Open all engines, peers first."""
    engines: list[Engine] = []
    if not openvino_only:
        torch.set_num_threads(cores())
        engines += _torch_engines(models)
        engines += [_session(models, name) for name in (ORT_FP32, ORT_INT8)]
    engines += [_openvino_peer(models, name) for name in PEERS_OPENVINO]
    return (*engines, *(_session(models, name) for name in OURS.values()))


def time_in_turns(
    engines: Sequence[Engine], pixels: Pixels, rounds: Mapping[int, int], *, settle_s: float = SETTLE_S
) -> list[dict[int, tuple[float, ...]]]:
    """Return for each engine, by batch size, ms per image in every round.

    Each is run untimed, once at the least and for `settle_s`, before it is timed: the threads of the one before may still be
    waiting for work, and the caches hold its weights. Every round has an order of its own, drawn with a fixed seed: were the
    one before always the same, what it leaves behind would be counted as its neighbour's time.
    """
    generator = np.random.default_rng(0)
    samples: list[dict[int, list[float]]] = [{} for _ in engines]
    for batch, n_rounds in rounds.items():
        order = [i for i, engine in enumerate(engines) if batch in engine.runs]
        for turn in range(n_rounds):
            first = turn * batch % max(1, len(pixels) - batch + 1)
            part = np.ascontiguousarray(pixels[first : first + batch])
            for i in generator.permutation(order):
                run = engines[i].runs[batch]
                settled_at = perf_counter() + settle_s
                run(part)
                while perf_counter() < settled_at:
                    run(part)
                start = perf_counter()
                run(part)
                samples[i].setdefault(batch, []).append((perf_counter() - start) * 1e3 / batch)
    return [{batch: tuple(round(ms, 4) for ms in times) for batch, times in each.items()} for each in samples]


def _torch_engines(models: Models) -> list[Engine]:
    last = copy.deepcopy(models.published).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [
        Engine(TORCH[0], dict.fromkeys(BATCHES, _inferring(models.published))),
        Engine(TORCH[1], dict.fromkeys(BATCHES, _inferring(last))),
        _compiled(models),
    ]


def _inferring(graph: Callable[..., object]) -> Run:
    def run(pixels: Pixels) -> object:
        with torch.inference_mode():
            return graph(torch.from_numpy(pixels))

    return run


def _compiled(models: Models) -> Engine:
    run = _inferring(torch.compile(models.published, dynamic=False))
    start = perf_counter()
    try:
        for batch in BATCHES:
            run(models.pixels[:batch])
    except Exception as err:  # noqa: BLE001 - of Inductor or the C++ compiler under it: what it says is the result
        return Engine(TORCH[2], {}, f"does not compile here: {str(err).splitlines()[0][:200]}")
    return Engine(TORCH[2], dict.fromkeys(BATCHES, run), f"compiled in {perf_counter() - start:.0f} s")


def _session(models: Models, name: str) -> Engine:
    return Engine(name, dict.fromkeys(BATCHES, session_of(models.folder, name).run))


def _openvino_peer(models: Models, name: str) -> Engine:
    model, threads = peer_model(models.folder, name), cores()
    single = StaticOpenvino(model, models.side, batch=1, piece=1, streams=1, threads=threads)
    runs: dict[str, Run] = {}
    for piece in _PIECES:
        streams = 1 if piece == BATCHES[1] else threads
        opened = StaticOpenvino(model, models.side, batch=BATCHES[1], piece=piece, streams=streams, threads=threads)
        runs[f"batch 16 as {BATCHES[1] // piece} of {piece} on {streams} streams"] = opened.run
    part = models.pixels[: BATCHES[1]]
    fastest = min(runs, key=lambda words: min(_seconds(runs[words], part) for _ in range(_TRIALS)))
    return Engine(name, {1: single.run, BATCHES[1]: runs[fastest]}, fastest)


def _seconds(run: Run, pixels: Pixels) -> float:
    run(pixels)
    start = perf_counter()
    run(pixels)
    return perf_counter() - start
