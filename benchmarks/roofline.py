"""How fast DenseNet-121 could be on a device: no layer is faster than its arithmetic or its memory traffic allow.

The bound counts each convolution's operations, and its activations and weights moved once: what is left when everything
between two convolutions is fused. Measured rates go in, so the bound is the device's at hand and not a brochure's.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ConvCost:
    """One convolution, for one image; numbers of elements, and of multiply-accumulates."""

    macs: int
    inputs: int
    weights: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device was measured to reach.

    Attributes:
        copy_bytes_per_s: read and written together, of a large copy.
        operations_per_s: of a large matrix product in the precision in question; a multiply-accumulate is two.
        bytes_per_element: of that precision.
    """

    copy_bytes_per_s: float
    operations_per_s: float
    bytes_per_element: int


def conv_costs(model: nn.Module, images: torch.Tensor) -> list[ConvCost]:
    """Return the costs of every convolution, in the order they run.

    Args:
        model: whose convolutions are counted.
        images: one image in the form that the model takes, [1, 3, S, S].
    """
    costs: list[ConvCost] = []

    def count(module: nn.Module, given: tuple[Any, ...], answer: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        weights = module.weight.numel()
        per_output = weights // module.out_channels
        costs.append(ConvCost(answer.numel() * per_output, given[0].numel(), weights, answer.numel()))

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return costs


def least_ms(costs: Sequence[ConvCost], batch: int, rates: Rates) -> float:
    """Return the shortest time one batch can take."""
    seconds = 0.0
    for cost in costs:
        moved = (batch * (cost.inputs + cost.outputs) + cost.weights) * rates.bytes_per_element
        computed = 2 * batch * cost.macs
        seconds += max(moved / rates.copy_bytes_per_s, computed / rates.operations_per_s)
    return 1000.0 * seconds


def measure_copy(device: str, n_bytes: int, runs: int = 20) -> float:
    """Return bytes read and written per second by copies of `n_bytes`."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _median_s(lambda: target.copy_(source), device, runs)


def measure_product(device: str, dtype: torch.dtype, side: int, runs: int = 20) -> float:
    """Return operations per second of products of two square matrices; int8 gives int32, float types themselves."""
    if dtype is torch.int8:
        a = torch.ones(side, side, dtype=dtype, device=device)
        b = torch.ones(side, side, dtype=dtype, device=device).t()  # column-major, as its kernels want it
        return 2 * side**3 / _median_s(lambda: torch._int_mm(a, b), device, runs)
    a = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / _median_s(lambda: a @ a, device, runs)


def _median_s(work: Callable[[], object], device: str, runs: int) -> float:
    samples = []
    for i in range(runs + 3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            samples.append(time.perf_counter() - start)
    return statistics.median(samples)
