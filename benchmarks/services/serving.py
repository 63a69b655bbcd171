"""What the HTTP service costs and stands: idle, loaded, overloaded, attacked, started.

    python -m benchmarks.services.serving BUNDLE [--seconds 300] [--rounds 5]      writes results/serving-cpu.json
    python -m benchmarks.services.serving --table                                  prints it as docs/serving.md shows it

The service runs in a process of its own, the client in this one, on the same cores: rates are lower than they would be with a
client elsewhere. Capacity is what 16 clients that ask one request after another get. Load is open: requests are sent whether or
not earlier ones were answered, at even distances and at random moments (Poisson), and a request's time counts from when it was
due. Beside each load stands what the same rule of batching comes to on a machine that never hesitates (queue_model.py), its
batches slowed down until it has the capacity that was measured. With and without batching take turns, round after round, and who
goes first changes. NaN stands for a percentile of nothing.
"""

import asyncio
import json
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Annotated, Any, Final

import numpy as np
import typer

from benchmarks.common import COMMAND, RESULTS, resident_mib, write_results
from benchmarks.services.queue_model import ideal_latencies_ms
from benchmarks.services.serving_client import (
    Client,
    Sample,
    attack,
    closed_loop,
    due_times_s,
    infer_request,
    open_loop,
    percentile_ms,
)
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.runtime.sessions.open import open_session
from chexnet_deploy.serving.http.batching import BatchPlan, measure_plan
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.terminal import run_program

OUT = RESULTS / "serving-cpu.json"
MODEL: Final = "chexnet"
CLIENTS: Final = 16
ATTACKERS: Final = 200
# By name: in words, the share of capacity, and the seed of the moments, None for even distances.
LOADS: Final[Mapping[str, tuple[str, float, int | None]]] = {
    "even_0.8": ("0.8 of capacity, evenly", 0.8, None),
    "random_0.8": ("0.8 of capacity, at random", 0.8, 8),
    "random_3": ("3 times capacity, at random", 3.0, 30),
}
ATTACK_S: Final = 15.0
LOGIT_TOLERANCE: Final = 1.0  # of the first answer against the fp32 model's; int8 differs by tenths

app = typer.Typer(add_completion=False)


class Service:
    """One service process, ready."""

    def __init__(self, bundle: Path, *options: str) -> None:
        began_s = perf_counter()
        command = [*COMMAND, "serve", str(bundle), "--name", MODEL, "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = 0
        assert self.process.stderr is not None  # as asked for
        for line in self.process.stderr:
            if "listening on" in line:
                self.port = int(line.rsplit(":", 1)[1])
            if "ready: " in line:
                break
        else:
            self.process.wait()
            raise RuntimeError("the service did not start")
        self.ready_s = perf_counter() - began_s

    def stop(self) -> int:
        """End it as an orchestrator does."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # where a measurement failed: nothing is left behind to disturb the next
        self.process.wait()


def measure_start(bundle: Bundle) -> dict[str, float]:
    """Time from starting the process to its first answer that is the known one."""
    probe = bundle.read_probe()
    began_s = perf_counter()
    with Service(bundle.path) as service:
        sample, body = asyncio.run(_ask_once(service.port, infer_request(MODEL, probe.pixels[:1])))
        elapsed_s = perf_counter() - began_s
        logits = np.frombuffer(body[-probe.logits[:1].nbytes :], "<f4")
        if sample.status != 200 or np.abs(logits - probe.logits[0]).max() > LOGIT_TOLERANCE:
            raise RuntimeError(f"the first answer was {sample.status}, or another than the known one")
    return {"ready_s": service.ready_s, "first_verified_answer_s": elapsed_s}


async def _ask_once(port: int, request: bytes) -> tuple[Sample, bytes]:
    client = Client(port)
    answer = await client.ask(request)
    await client.close()
    return answer


def measure_session(bundle: Bundle, runs: int) -> dict[str, float]:
    """Time the same image in this process, without HTTP."""
    session, pixels = open_session(bundle), bundle.read_probe().pixels[:1]
    times_ms = []
    for _ in range(runs):
        began_s = perf_counter()
        session.run(pixels)
        times_ms.append((perf_counter() - began_s) * 1000.0)
    session.close()
    return {"p50_ms": float(np.percentile(times_ms, 50)), "p99_ms": float(np.percentile(times_ms, 99))}


def measure_batches(bundle: Bundle) -> BatchPlan:
    """Time batches in this process as a service does when it starts."""
    session = open_session(bundle)
    plan = measure_plan(session, bundle.read_probe().pixels, ServeConfig(bundle.path).max_batch)
    session.close()
    return plan


def model_load(plan: BatchPlan, capacity: float, rate: float, seconds: float, seed: int | None) -> dict[str, float]:
    """Return what a service without hesitation would take at a rate."""
    slowdown = 1000.0 / capacity / plan.ms_per_image[-1]  # by HTTP and the client, on the same cores
    latencies_ms = ideal_latencies_ms(plan, due_times_s(rate=rate, seconds=seconds, seed=seed), slowdown=slowdown)
    return {"p50_ms": float(np.percentile(latencies_ms, 50)), "p99_ms": float(np.percentile(latencies_ms, 99))}


def measure_batching(bundle: Path, request: bytes, rounds: int, seconds: float) -> dict[str, Any]:
    """Run one client, then sixteen, with batching and without, in turns."""
    with Service(bundle) as batched, Service(bundle, "--max-batch", "1") as alone:
        ports = {"batched": batched.port, "single": alone.port}
        found: dict[str, dict[str, list[float]]] = {name: {"idle_p50_ms": [], "images_per_s": []} for name in ports}
        for turn in range(rounds):
            for name in sorted(ports, reverse=bool(turn % 2)):
                idle, _ = asyncio.run(closed_loop(ports[name], request, clients=1, seconds=seconds))
                _, rate = asyncio.run(closed_loop(ports[name], request, clients=CLIENTS, seconds=seconds))
                found[name]["idle_p50_ms"].append(percentile_ms(idle, 50, 200))
                found[name]["images_per_s"].append(rate)
    on, off = found["batched"], found["single"]
    gains = [a / b for a, b in zip(on["images_per_s"], off["images_per_s"], strict=True)]
    added = [a - b for a, b in zip(on["idle_p50_ms"], off["idle_p50_ms"], strict=True)]
    return {**found, "gain": median(gains), "added_idle_p50_ms": median(added)}


def measure_load(service: Service, request: bytes, rate: float, seconds: float, seed: int | None) -> dict[str, Any]:
    """Send at a rate for a while, evenly without a seed; return what came of it."""
    before_mib = resident_mib(service.process.pid)
    samples = asyncio.run(open_loop(service.port, request, rate=rate, seconds=seconds, seed=seed))
    counts = {str(status): sum(s.status == status for s in samples) for status in sorted({s.status for s in samples})}
    return {
        "rate": rate,
        "seconds": seconds,
        "answers": counts,
        "goodput": counts.get("200", 0) / seconds,
        "p50_ms": percentile_ms(samples, 50, 200),
        "p99_ms": percentile_ms(samples, 99, 200),
        "refusal_p99_ms": percentile_ms(samples, 99, 503),
        "rss_before_mib": before_mib,
        "rss_after_mib": resident_mib(service.process.pid),
    }


def measure_attack(service: Service, request: bytes) -> dict[str, float]:
    """Ask now and then, alone and then beside attackers."""

    async def both() -> tuple[list[Sample], list[float]]:
        attacking = asyncio.ensure_future(attack(service.port, peers=ATTACKERS, seconds=ATTACK_S))
        await asyncio.sleep(0.5)
        samples = await open_loop(service.port, request, rate=20.0, seconds=9.0, seed=2)
        return samples, await attacking

    idle = asyncio.run(open_loop(service.port, request, rate=20.0, seconds=9.0, seed=1))
    samples, lived_s = asyncio.run(both())
    return {
        "attackers": ATTACKERS,
        "idle_p99_ms": percentile_ms(idle, 99, 200),
        "attacked_p99_ms": percentile_ms(samples, 99, 200),
        "not_answered": sum(sample.status != 200 for sample in samples),
        "longest_attacker_s": max(lived_s),
    }


@app.command()
def main(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle.")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of each open-loop load.")] = 300.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns with and without batching.")] = 5,
    turn_s: Annotated[float, typer.Option(min=0.5, help="Of each closed loop in a turn.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = OUT,
    table: Annotated[bool, typer.Option("--table", help="Print the committed results and stop.")] = False,
) -> None:
    """Measure the HTTP service and write JSON."""
    if table:
        typer.echo(markdown_table(json.loads(OUT.read_text())))
        return
    if bundle is None:
        raise typer.BadParameter("give a bundle")
    opened = Bundle.open(bundle)
    request = infer_request(MODEL, opened.read_probe().pixels[:1])
    starts, plan = [measure_start(opened) for _ in range(3)], measure_batches(opened)
    results: dict[str, Any] = {
        "bundle": {"id": opened.id, "precision": opened.manifest.precision.value},
        "resize_px": opened.manifest.preprocessing.resize_px,
        "start": starts,
        "session": measure_session(opened, 300),
        "batch_ms_per_image": dict(zip(plan.sizes, plan.ms_per_image, strict=True)),
        "batching": measure_batching(opened.path, request, rounds, turn_s),
    }
    with Service(opened.path) as service:
        single, _ = asyncio.run(closed_loop(service.port, request, clients=1, seconds=turn_s))
        _, capacity = asyncio.run(closed_loop(service.port, request, clients=CLIENTS, seconds=2 * turn_s))
        results["single_stream"] = {"p50_ms": percentile_ms(single, 50, 200), "p99_ms": percentile_ms(single, 99, 200)}
        results["capacity_images_per_s"] = capacity
        results["attack"] = measure_attack(service, request)
        for name, (_, share, seed) in LOADS.items():
            results[f"load_{name}"] = measure_load(service, request, share * capacity, seconds, seed)
            if share < 1.0:
                results[f"load_{name}"]["ideal"] = model_load(plan, capacity, share * capacity, seconds, seed)
            sleep(1.0)
        results["exit_code"] = service.stop()
    results["bars"] = judge(results)
    write_results(out, results)
    shown = ("capacity_images_per_s", *(f"load_{name}" for name in LOADS), "bars")
    typer.echo(json.dumps({name: results[name] for name in shown}, indent=1))


def judge(found: dict[str, Any]) -> dict[str, bool]:
    """Hold the results against what was promised."""
    even, random, hard, attacked = (
        found[name] for name in ("load_even_0.8", "load_random_0.8", "load_random_3", "attack")
    )
    service_ms = found["single_stream"]["p50_ms"]
    return {
        "starts within 5 s": max(start["first_verified_answer_s"] for start in found["start"]) <= 5.0,
        "batching gains 1.2 times": found["batching"]["gain"] >= 1.2,
        "batching adds at most 1 ms when idle": found["batching"]["added_idle_p50_ms"] <= 1.0,
        "no errors at 0.8": set(even["answers"]) | set(random["answers"]) == {"200"},
        "p99 at an even 0.8 within 10 single-stream p50": even["p99_ms"] <= 10.0 * service_ms,
        "p50 at an even 0.8 within 2.5 single-stream p50": even["p50_ms"] <= 2.5 * service_ms,
        "goodput at 3 at least 0.9 of capacity": hard["goodput"] >= 0.9 * found["capacity_images_per_s"],
        "nothing but 200 and 503 at 3": set(hard["answers"]) <= {"200", "503"},
        "503 within 100 ms at 3": hard["refusal_p99_ms"] <= 100.0,
        "memory flat": hard["rss_after_mib"] <= 1.1 * even["rss_before_mib"],
        "p99 attacked within twice idle": attacked["attacked_p99_ms"] <= 2.0 * attacked["idle_p99_ms"],
        "all answered under attack": attacked["not_answered"] == 0,
        "attackers closed within 10.5 s": attacked["longest_attacker_s"] <= 10.5,
        "ends with 0": found["exit_code"] == 0,
    }


def markdown_table(found: Mapping[str, Any]) -> str:
    """Return the results as tables for people."""
    single, capacity, batching, attacked = (
        found[name] for name in ("single_stream", "capacity_images_per_s", "batching", "attack")
    )
    lines = [
        "| load | sent/s | answered/s | refused with 503 | p50 | p99 | without hesitation: p50, p99 | 503 within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (words, _, _) in LOADS.items():
        load = found[f"load_{name}"]
        n_refused, n = load["answers"].get("503", 0), sum(load["answers"].values())
        refused = f"{load['refusal_p99_ms']:.0f} ms" if n_refused else ""
        ideal = "{p50_ms:.1f} ms, {p99_ms:.0f} ms".format_map(load["ideal"]) if "ideal" in load else ""
        lines.append(
            f"| {words} | {load['rate']:.0f} | {load['goodput']:.0f} | {100.0 * n_refused / n:.2f} % | {load['p50_ms']:.1f} ms "
            f"| {load['p99_ms']:.0f} ms | {ideal} | {refused} |"
        )
    first_s = max(start["first_verified_answer_s"] for start in found["start"])
    machine = found["machine"]
    seconds = found["load_even_0.8"]["seconds"]
    grown_mib = found["load_random_3"]["rss_after_mib"] - found["load_even_0.8"]["rss_before_mib"]
    return "\n".join(
        [
            *lines,
            "",
            "| what | measured |",
            "|---|---|",
            f"| one client, one request after another | p50 {single['p50_ms']:.1f} ms, "
            f"of it {found['session']['p50_ms']:.1f} ms the model |",
            f"| capacity: {CLIENTS} clients, one request after another each | {capacity:.0f} images/s |",
            f"| batching against none, {CLIENTS} clients | {batching['gain']:.2f} times the images/s |",
            f"| the same, one client | {batching['added_idle_p50_ms']:+.1f} ms |",
            f"| p99 at 20 requests/s, alone and beside {attacked['attackers']} slow connections "
            f"| {attacked['idle_p99_ms']:.0f} and {attacked['attacked_p99_ms']:.0f} ms |",
            f"| the slow connections were closed | within {attacked['longest_attacker_s']:.1f} s |",
            f"| start to the first verified answer, worst of {len(found['start'])} | {first_s:.1f} s |",
            f"| memory grown over all three loads | {grown_mib:.0f} MiB of {found['load_random_3']['rss_after_mib']:.0f} |",
            "",
            f"{found['bundle']['precision']} bundle, {found['resize_px']} px, each load for {seconds:.0f} s; "
            f"service and client share {machine['cores']} cores of {machine['processor']}.",
        ]
    )


if __name__ == "__main__":
    run_program(app)
