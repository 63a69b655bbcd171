"""What the rows of the GPU benchmark say of each other, in words: ratios to torch, shares of bounds, overheads."""

from collections.abc import Iterator, Mapping
from typing import Any

BASELINE = "torch-compile-fp16"


def summarise(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return one line for each thing that two rows say together."""
    said: dict[str, str] = {}
    ceilings, baseline = rows.get("ceilings", {}), rows.get(BASELINE, {})
    for name, row in rows.items():
        for size, entry in row.get("batches", {}).items():
            best = _best(entry)
            gpu_ms = best.get("stages_ms", {}).get("compute")
            if gpu_ms:
                said |= {
                    f"{name}, {what} at batch {size}": share
                    for what, share in _shares(row, int(size), gpu_ms, ceilings)
                }
            other = baseline.get("batches", {}).get(size)
            if other is not None and name.startswith("tensorrt"):
                theirs = _best(other)
                said[f"{name} / torch.compile, images/s of one lane at batch {size}"] = (
                    f"{best['images_per_s'] / theirs['images_per_s']:.2f}"
                )
                if gpu_ms and theirs.get("stages_ms", {}).get("compute"):
                    said[f"{name} / torch.compile, speed on the GPU's clock at batch {size}"] = (
                        f"{theirs['stages_ms']['compute'] / gpu_ms:.2f}"
                    )
            variants = entry["variants"]
            if "bare" in variants:
                overhead_us = 1000.0 * (variants["plain"]["p50_ms"] - variants["bare"]["p50_ms"])
                said[f"{name}, session over bare execute at batch {size}"] = f"{overhead_us:.0f} us"
    return said


def _shares(row: Mapping[str, Any], size: int, gpu_ms: float, ceilings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the GPU time's share of the per-layer bound, at batch 1 with a launch floor, and of the plan's own traffic."""
    card = row.get("engine", {})
    least_ms = ceilings.get("per_layer_bound_ms", {}).get(row.get("form"), {}).get(str(size))
    n_kernels, node_us = card.get("n_kernels"), ceilings.get("graph_node_us")
    if least_ms is not None and size > 1:
        yield "share of the per-layer bound", f"{least_ms / gpu_ms:.2f}"
    elif least_ms is not None and n_kernels and node_us:
        floor_ms = n_kernels * node_us / 1000.0
        yield f"share of the launch floor of {n_kernels} kernels", f"{max(least_ms, floor_ms) / gpu_ms:.2f}"
    if card.get("bytes_per_image") and ceilings.get("copy_bytes_per_s") and size > 1:
        own_ms = 1000.0 * size * card["bytes_per_image"] / ceilings["copy_bytes_per_s"]
        yield "share of its own traffic's bound", f"{own_ms / gpu_ms:.2f}"


def line(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row of the table printed last."""
    batches, parity = row.get("batches", {}), row.get("parity", {})
    best = {int(size): _best(entry) for size, entry in batches.items()}
    most = max((variant["images_per_s"] for variant in best.values()), default=None)
    flight = max((max(e["in_flight_images_per_s"].values(), default=0.0) for e in batches.values()), default=0.0)
    gpu_ms = best[max(best)]["stages_ms"].get("compute") if best else None
    gap = parity.get("max_abs_probability_difference")
    invalid = next((entry["clocks"]["invalid"] for entry in batches.values() if entry["clocks"]["invalid"]), None)
    note = row.get("error") or row.get("skipped") or (f"INVALID: {invalid}" if invalid else parity.get("summary", ""))
    last = str(note).strip().splitlines()[-1:]  # of a traceback
    return {
        "row": name,
        "p50 ms, batch 1": f"{best[1]['p50_ms']:.3f}" if 1 in best else "",
        "GPU ms, largest": f"{gpu_ms:.3f}" if gpu_ms else "",
        "images/s": "" if most is None else f"{most:.0f}",
        "in flight": f"{flight:.0f}" if flight else "",
        "max |Δp|": "" if gap is None else f"{gap:.4f}",
        "": "".join(last)[:90],
    }


def _best(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the variant that a user gets: the first."""
    best: Mapping[str, Any] = next(iter(entry["variants"].values()))
    return best
