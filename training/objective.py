"""What training minimises, how fast it learns, and from where it starts."""

import math

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from training.recipe import Recipe

Schedule = OneCycleLR | LambdaLR | ReduceLROnPlateau


class Loss(nn.Module):
    """Binary cross-entropy of logits, in the form a recipe names.

    A label that is NaN, not known, costs nothing. The weighted form is the paper's (section 2.1): absent images of a finding weigh
    as much as present ones in sum.

    Args:
        kind: Recipe.loss.
        truth: [N, C] of all training images; the weights come from it.
    """

    weight_present: Tensor
    weight_absent: Tensor

    def __init__(self, kind: str, truth: Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.is_partial = bool(truth.isnan().any().item())  # asked once: asking at each step would make a GPU wait
        share = prevalence(truth)
        self.register_buffer("weight_present", 1.0 - share)
        self.register_buffer("weight_absent", share)

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Return the mean over images of one number an image; of "bce_mean" over the labels known."""
        known = None
        if self.is_partial:
            known = ~truth.isnan()
            truth = truth.nan_to_num(0.0)
        weight = None
        if self.kind == "weighted_bce":
            weight = truth * self.weight_present + (1.0 - truth) * self.weight_absent
        each = nn.functional.binary_cross_entropy_with_logits(logits.float(), truth, weight, reduction="none")
        if known is not None:
            each = each * known
            if self.kind == "bce_mean":
                return each.sum() / known.sum().clamp(min=1)
        return each.mean() if self.kind == "bce_mean" else each.sum(dim=1).mean()


def prevalence(truth: Tensor) -> Tensor:
    """Return the share [C] of present findings among the labels [N, C] that are known."""
    return truth.nanmean(dim=0) if truth.isnan().any() else truth.mean(dim=0)


def build_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser, fused: a sixth of the time on a CPU too."""
    if recipe.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.max_learning_rate, fused=True)
    # Decay on weights only: BatchNorm's scale and shift and the biases have no scale to be kept small.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.max_learning_rate, betas=(0.9, 0.99), fused=True)


def build_schedule(optimiser: torch.optim.Optimizer, recipe: Recipe, total_steps: int) -> Schedule:
    """Return what moves the learning rate: after every step, but "plateau" after every epoch."""
    if recipe.schedule == "one_cycle":
        return OneCycleLR(optimiser, recipe.max_learning_rate, total_steps=total_steps, pct_start=0.1, div_factor=4.0)
    if recipe.schedule == "plateau":
        return ReduceLROnPlateau(optimiser, factor=0.1, patience=0)
    warm = max(1, round(recipe.warmup_share * total_steps))

    def share_of_peak(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, total_steps - warm))
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return LambdaLR(optimiser, share_of_peak)


def start_from_prevalence(head: nn.Linear, truth: Tensor) -> None:
    """Set the head's bias so that the first answers are the prevalences, which the first epoch then needn't learn."""
    share = prevalence(truth).clamp(1e-3, 1.0 - 1e-3)
    with torch.no_grad():
        head.bias.copy_(torch.logit(share))
