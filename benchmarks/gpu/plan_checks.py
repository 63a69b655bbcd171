"""Does a plan answer alike in every slot, batch size and thread, and does it leak? For any interpreter, without pytest."""

from pathlib import Path

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.evaluation.invariance import InvarianceReport, measure_invariance
from chexnet_deploy.runtime.sessions.driver import open_driver, primary_context
from chexnet_deploy.runtime.sessions.trt import TrtSession

LANES = 2


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


def invariance(plan: Bundle) -> InvarianceReport:
    """Measure how far one image's answers spread, with two lanes so that threads meet."""
    session = TrtSession.open(plan, lanes=LANES)
    try:
        return measure_invariance(session, plan.read_probe().pixels, session.batch_range[1])
    finally:
        session.close()


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)


def _device_mib() -> float:
    driver = open_driver()
    with primary_context(driver, 0):
        free, total = driver.memory_info()
    return (total - free) / (1 << 20)
