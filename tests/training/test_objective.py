import math

import pytest
import torch

from chexnet_deploy.export.from_torch.model import CheXNet
from training.objective import Loss, build_optimiser, build_schedule, prevalence, start_from_prevalence
from training.recipe import Recipe

RECIPE = Recipe(resize_px=32, epochs=10, batch_size=16, max_learning_rate=0.1, weight_decay=0.01, seed=0)
TRUTH = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # a quarter and a half are present


def test_losses_by_hand() -> None:
    # Every logit 0: every cross-entropy is ln 2.
    logits = torch.zeros(4, 2)
    assert float(Loss("bce_mean", TRUTH)(logits, TRUTH)) == pytest.approx(math.log(2))
    assert float(Loss("bce_sum", TRUTH)(logits, TRUTH)) == pytest.approx(2 * math.log(2))
    # Weights of the first finding: present 3/4 once, absent 1/4 three times; of the second: 1/2 each, twice.
    expected = (0.75 + 3 * 0.25 + 4 * 0.5) * math.log(2) / 4
    assert float(Loss("weighted_bce", TRUTH)(logits, TRUTH)) == pytest.approx(expected)


def test_the_head_starts_from_the_prevalences() -> None:
    model = CheXNet(2)
    start_from_prevalence(model.classifier, TRUTH)
    torch.testing.assert_close(torch.sigmoid(model.classifier.bias), torch.tensor([0.25, 0.5]))


def test_weights_alone_decay() -> None:
    groups = build_optimiser(CheXNet(2), RECIPE).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])


def rates(schedule: str, losses: list[float] | None = None) -> list[float]:
    recipe = RECIPE.model_copy(update={"schedule": schedule, "warmup_share": 0.2})
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=recipe.max_learning_rate)
    stepped = build_schedule(optimiser, recipe, 10)
    seen = [optimiser.param_groups[0]["lr"]]
    for i in range(9 if losses is None else len(losses)):
        optimiser.step()
        stepped.step() if losses is None else stepped.step(losses[i])  # type: ignore[arg-type]
        seen.append(optimiser.param_groups[0]["lr"])
    return seen


def test_cosine_warms_up_and_goes_down_to_nothing() -> None:
    seen = rates("cosine")
    assert seen[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert seen[6] == pytest.approx(0.05)  # half way down after half of the eight steps that are left
    assert seen[9] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_a_plateau_divides_by_ten() -> None:
    assert rates("plateau", [1.0, 0.9, 0.95, 0.8, 0.85]) == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize(("kind", "of_known"), [("bce_mean", 3), ("bce_sum", 2)])
def test_labels_that_nobody_knows_cost_nothing(kind: str, of_known: int) -> None:
    # Three labels of two images are known, and the logit 0 costs ln 2 each.
    truth = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = Loss(kind, truth)(logits, truth)
    assert float(loss.detach()) == pytest.approx(3 * math.log(2) / of_known)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0.0
    assert prevalence(truth).tolist() == [0.5, 1.0]
