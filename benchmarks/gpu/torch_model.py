"""PyTorch at its best on the same weights: one module from uint8 pixels on, page-locked and static buffers, channels last."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.model import CheXNet, Normalise
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits

COMPILE_MODES = {"compile-fp16": "reduce-overhead", "autotune-fp16": "max-autotune"}
STAGES = ("upload", "compute", "download")


class _Deployed(nn.Module):
    def __init__(self, normalise: Normalise, model: CheXNet, mode: str, device: str) -> None:
        super().__init__()
        self.is_half, self.has_autocast = mode in COMPILE_MODES, mode == "amp-fp16"
        self.is_last, self.device = mode != "eager-fp32", device
        self.normalise, self.model = normalise, model.half() if self.is_half else model

    def forward(self, pixels: Tensor) -> Tensor:
        images = self.normalise(pixels)
        if self.is_half:
            images = images.half()
        if self.is_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device, dtype=torch.float16, enabled=self.has_autocast):
            logits: Tensor = self.model(images)
        return logits.float()


class TorchModel:
    """The model as a session; it draws no maps, which favours it.

    Args:
        checkpoint: a .safetensors file.
        mode: see Task.
        device: "cuda", or "cpu" for a dry run.
    """

    def __init__(self, checkpoint: Path, mode: str, device: str) -> None:
        if device == "cpu":  # a dry run; threads that wait for each other on a busy machine take minutes
            torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
        # Float32 means float32, as in the plans.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        loaded = read_checkpoint(checkpoint)
        module: Any = _Deployed(Normalise(loaded.manifest.preprocessing), loaded.model, mode, device).eval().to(device)
        if mode != "eager-fp32":
            module = module.to(memory_format=torch.channels_last)
        if mode in COMPILE_MODES:
            module = torch.compile(module, mode=COMPILE_MODES[mode], dynamic=False)
        self._module, self._device, self._buffers = module, device, dict[int, tuple[Tensor, ...]]()

    def run(self, pixels: Pixels) -> tuple[Logits, Logits]:
        """Return the logits, twice: in the maps' place too."""
        host, _, answer = self._buffers_for(pixels)
        host.numpy()[:] = pixels
        with torch.inference_mode():
            self._download(pixels, self._compute(self._upload(pixels)))
        if self._device == "cuda":
            torch.cuda.synchronize()
        logits: Logits = answer.numpy().copy()
        return logits, logits

    def stage_times_ms(self, pixels: Pixels) -> Mapping[str, float]:
        """Return the GPU's own times of one run by stage, as TrtSession does; on a CPU zeros."""
        if self._device != "cuda":
            return dict.fromkeys(STAGES, 0.0)
        events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            events[0].record()
            given = self._upload(pixels)
            events[1].record()
            logits = self._compute(given)
            events[2].record()
            self._download(pixels, logits)
            events[3].record()
        torch.cuda.synchronize()
        return {name: events[i].elapsed_time(events[i + 1]) for i, name in enumerate(STAGES)}

    def _upload(self, pixels: Pixels) -> Tensor:
        host, given, _ = self._buffers_for(pixels)
        return given.copy_(host, non_blocking=True)

    def _compute(self, given: Tensor) -> Tensor:
        logits: Tensor = self._module(given)
        return logits

    def _download(self, pixels: Pixels, logits: Tensor) -> None:
        self._buffers_for(pixels)[2].copy_(logits, non_blocking=True)

    def _buffers_for(self, pixels: Pixels) -> tuple[Tensor, ...]:
        size, pinned = len(pixels), self._device == "cuda"
        if size not in self._buffers:
            with torch.inference_mode():
                n_findings = self._module.model.classifier.out_features
                host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=pinned)
                answer = torch.empty((size, n_findings), pin_memory=pinned)
                self._buffers[size] = host, host.to(self._device, copy=True), answer
        return self._buffers[size]
