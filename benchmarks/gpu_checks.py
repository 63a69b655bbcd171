"""Does a plan answer alike in every slot, batch size and thread, and does it leak? For any interpreter, without pytest."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.predictor import sigmoid
from chexnet_deploy.sessions.target import open_driver
from chexnet_deploy.sessions.trt import TrtSession

THREADS, LANES = 8, 2


def memory_growth(plan: Bundle, n_runs: int) -> dict[str, float]:
    """Return how many MiB the process and the device grow over many runs of one image, after a tenth of them."""
    pixels = plan.read_probe().pixels[:1]
    session = TrtSession.open(plan)
    try:
        for _ in range(n_runs // 10):
            session.run(pixels)
        before = _resident_mib(), _device_mib()
        for _ in range(n_runs):
            session.run(pixels)
        after = _resident_mib(), _device_mib()
    finally:
        session.close()
    return {"host_mib": after[0] - before[0], "device_mib": after[1] - before[1], "n_runs": n_runs}


def invariance(plan: Bundle) -> dict[str, Any]:
    """Return the largest |difference| of one image's answers over slots, batch sizes and threads."""
    pixels = plan.read_probe().pixels
    session = TrtSession.open(plan, lanes=LANES)
    try:
        n = min(len(pixels), session.batch_range[1])
        alone = np.concatenate([session.run(pixels[i : i + 1])[0] for i in range(n)])
        with ThreadPoolExecutor(THREADS) as pool:
            jobs = [pixels[i : i + 1] for i in range(n)] * THREADS
            threaded = np.concatenate([logits for logits, _ in pool.map(session.run, jobs)])
        turned = [np.roll(session.run(np.roll(pixels[:n], shift, 0))[0], -shift, 0) for shift in range(n)]
        sizes = {size: session.run(pixels[:size])[0] for size in range(1, n + 1)}
    finally:
        session.close()
    slots = np.stack(turned)
    return {
        "threads_max_abs_logit": float(np.abs(threaded - np.tile(alone, (THREADS, 1))).max()),
        "slots_max_abs_logit": float(np.abs(slots - slots[0]).max()),
        "batch_sizes_max_abs_logit": max(float(np.abs(got - alone[:size]).max()) for size, got in sizes.items()),
        "batch_sizes_max_abs_probability": max(
            float(np.abs(sigmoid(got) - sigmoid(alone[:size])).max()) for size, got in sizes.items()
        ),
        "n_images": n,
        "largest_batch": n,
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)


def _device_mib() -> float:
    cuda = open_driver()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    try:
        free, total = cuda.mem_get_info()
        return float(total - free) / (1 << 20)
    finally:
        cuda.Context.pop()
        context.detach()
