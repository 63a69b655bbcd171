"""How fast DenseNet-121 could be on a device: no layer is faster than its arithmetic or its memory traffic allow.

The bound counts each convolution's operations, and its activations and weights moved once: what is left when everything
between two convolutions is fused. Measured rates go in, so the bound is the device's at hand and not a brochure's.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ConvCost:
    """One convolution, for one image: its kernel's side, numbers of elements, and of multiply-accumulates."""

    side: int
    macs: int
    inputs: int
    weights: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Form:
    """What a form of the network moves and computes with, for its 1x1 convolutions or for all others.

    Attributes:
        input_bytes: of one element that a convolution reads; likewise for weights and outputs.
        operations_per_s: measured in its arithmetic; a multiply-accumulate is two.
    """

    input_bytes: int
    weight_bytes: int
    output_bytes: int
    operations_per_s: float


def forms(operations_per_s: Mapping[str, float]) -> dict[str, tuple[Form, Form]]:
    """Return each form's 1x1 convolutions and its others, for the arithmetics that were measured.

    Int8 convolutions read int8 and write the concat's float16; `mixed` has int8 in its 1x1 convolutions alone.
    """
    whole = {
        name: Form(*sizes, operations_per_s[name])
        for name, sizes in (("fp32", (4, 4, 4)), ("fp16", (2, 2, 2)), ("int8", (1, 1, 2)))
        if name in operations_per_s
    }
    found = {name: (form, form) for name, form in whole.items()}
    if "int8" in whole and "fp16" in whole:
        found["mixed"] = whole["int8"], whole["fp16"]
    return found


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
        side = module.kernel_size[0]
        costs.append(ConvCost(side, answer.numel() * per_output, given[0].numel(), weights, answer.numel()))

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return costs


def least_ms(costs: Sequence[ConvCost], batch: int, copy_bytes_per_s: float, form: tuple[Form, Form]) -> float:
    """Return the per-layer bound: the shortest time of one batch where every convolution's input and output are moved.

    A kernel that keeps what lies between two convolutions on the chip can beat it.
    """
    seconds = 0.0
    for cost in costs:
        kind = form[0] if cost.side == 1 else form[1]
        activations = cost.inputs * kind.input_bytes + cost.outputs * kind.output_bytes
        moved = batch * activations + cost.weights * kind.weight_bytes
        seconds += max(moved / copy_bytes_per_s, 2 * batch * cost.macs / kind.operations_per_s)
    return 1000.0 * seconds


def measure_copy(device: str, n_bytes: int, runs: int = 20) -> float:
    """Return bytes read and written per second by copies of `n_bytes` of random data."""
    source = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _median_s(lambda: target.copy_(source), device, runs)


def measure_product(device: str, dtype: torch.dtype, side: int, runs: int = 20) -> float:
    """Return operations per second of products of two random square matrices; int8 gives int32.

    Random, as ones and zeros draw less power and are multiplied at a higher clock.
    """
    if dtype is torch.int8:
        a, b = (torch.randint(-128, 128, (side, side), dtype=dtype, device=device) for _ in range(2))
        b = b.t()  # column-major, as its kernels want it
        return 2 * side**3 / _median_s(lambda: torch._int_mm(a, b), device, runs)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _median_s(lambda: a @ b, device, runs)


def measure_node_us(n_nodes: int = 500, runs: int = 50) -> float:
    """Return how long one kernel with nothing to do takes in a CUDA graph of such kernels, each after the other."""
    x = torch.zeros(1, device="cuda")
    x.add_(1.0)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n_nodes):
            x.add_(1.0)
    return 1e6 * _median_s(graph.replay, "cuda", runs) / n_nodes


def _median_s(work: Callable[[], object], device: str, runs: int) -> float:
    samples = []
    for i in range(runs + 3):
        if device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            events[0].record()
            work()
            events[1].record()
            torch.cuda.synchronize()
            seconds = float(events[0].elapsed_time(events[1])) / 1000.0
        else:
            start = time.perf_counter()
            work()
            seconds = time.perf_counter() - start
        if i >= 3:
            samples.append(seconds)
    return float(statistics.median(samples))
