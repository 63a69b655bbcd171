"""What a run leaves to be read: run.json, metrics.jsonl, throughput.jsonl, TensorBoard's scalars, a picture of the curve."""

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from chexnet_deploy.files import write_file

CARD = "run.json"
METRICS = "metrics.jsonl"
THROUGHPUT = "throughput.jsonl"
CURVE = "learning_curve.png"
TENSORBOARD = "tensorboard"


def write_metrics(run: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics.jsonl, a line an epoch; it holds nothing that two equal runs would differ in."""
    write_file(run / METRICS, "".join(json.dumps(epoch) + "\n" for epoch in history).encode())


def write_card(run: Path, card: Mapping[str, Any]) -> None:
    """Write run.json: what a reader of the weights asks of the run that made them."""
    write_file(run / CARD, (json.dumps(card, indent=1) + "\n").encode())


def epoch_line(line: Mapping[str, Any], n_epochs: int, left_s: float) -> str:
    """Return an epoch in one line of text, with the time that the others will take."""
    area = "undefined" if line["val_mean_auroc"] is None else f"{line['val_mean_auroc']:.4f}"
    return (
        f"epoch {line['epoch']} of {n_epochs}: loss {line['train_loss']:.4f}, validation loss {line['val_loss']:.4f}, "
        f"mean AUROC {area} of {line['val_findings_counted']} findings; {timedelta(seconds=round(left_s))} left"
    )


def append_throughput(run: Path, line: Mapping[str, Any]) -> None:
    """Add an epoch's speed to throughput.jsonl; a resumed epoch has two lines."""
    with (run / THROUGHPUT).open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_scalars(run: Path, line: Mapping[str, Any]) -> None:
    """Add an epoch to TensorBoard's log, where tensorboard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return  # metrics.jsonl holds the same
    with SummaryWriter(str(run / TENSORBOARD)) as writer:
        for name, value in line.items():
            if isinstance(value, int | float) and name != "epoch":
                writer.add_scalar(name, value, line["epoch"])


def draw_curve(run: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw losses and validation AUROC over the epochs."""
    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, areas = figure.subplots(1, 2)
    losses.plot(epochs, [line["train_loss"] for line in history], "o-", label="training")
    losses.plot(epochs, [line["val_loss"] for line in history], "s--", label="validation")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    areas.plot(epochs, [line["val_mean_auroc"] for line in history], "s--", color="tab:orange")
    areas.set(xlabel="epoch", ylabel="mean AUROC, validation")
    figure.savefig(run / CURVE, dpi=110)
