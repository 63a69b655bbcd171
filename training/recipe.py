"""One training run as data: what a TOML in training/recipes may say. Two runs of one recipe on one machine give the same bytes."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import SpecError
from chexnet_deploy.inputs import Record, describe, read_toml

RECIPES: Final = Path(__file__).parent / "recipes"
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Augmentation(Record):
    """What is done to a training image; everything is drawn anew each time it is seen.

    Attributes:
        flip_probability: left-right, the paper's only augmentation. It moves the heart to the other side.
        rotate_degrees: drawn from plus to minus this.
        shift_share: of the side, in both directions.
        scale_share: larger or smaller by up to this.
        contrast_share: contrast and brightness, up or down by up to this.
        mixup_share: another image and its labels are blended in by up to this (mixup: Zhang et al. 2018).
    """

    flip_probability: Share = 0.0
    rotate_degrees: Annotated[float, Field(ge=0.0, le=45.0)] = 0.0
    shift_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    scale_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    contrast_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    mixup_share: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0


class Recipe(BaseModel):
    """One training run.

    Attributes:
        findings: the head's outputs, in order.
        batch_size: images a step, over all processes.
        initial_weights: "imagenet" needs a file of torchvision's; without it training starts from scratch, and says so.
            "checkpoint" needs one of this project's, of any resolution and findings.
        optimiser: "adam" with torch's own momentum, or "adamw", which takes weight_decay off the weights alone.
        schedule: "one_cycle" over the run; "cosine" after a warm-up; "plateau" divides by ten after an epoch whose
            validation loss is not the lowest.
        warmup_share: of the run's steps, for "cosine".
        loss: "bce_mean" over findings and images; "bce_sum" over findings, as the paper's 14-finding model; "weighted_bce"
            with the paper's class weights, as its pneumonia model.
        teacher_share: of a teacher's answers in what is learnt, the rest being the labels; 0 for no teacher.
        select_by: what the kept epoch is best in, on validation patients.
        ema_decay: of an average of the weights, which is then validated and kept; 0 for none.
        precision: of the arithmetic; "bf16" and "fp16" are torch's automatic mixed precision.
        compile_on_gpu: torch.compile, where there is a GPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    findings: Annotated[tuple[str, ...], Field(min_length=1)] = FINDINGS
    resize_px: Annotated[int, Field(ge=32, le=1024, multiple_of=32)]
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    initial_weights: Literal["scratch", "imagenet", "checkpoint"] = "scratch"
    optimiser: Literal["adam", "adamw"] = "adamw"
    max_learning_rate: Annotated[float, Field(gt=0.0)]
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["one_cycle", "cosine", "plateau"] = "one_cycle"
    warmup_share: Share = 0.05
    loss: Literal["bce_mean", "bce_sum", "weighted_bce"] = "bce_mean"
    teacher_share: Share = 0.0
    select_by: Literal["val_loss", "val_mean_auroc"] = "val_loss"
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile_on_gpu: bool = False
    augmentation: Augmentation = Augmentation()
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Recipe":
        unknown = sorted(set(self.findings) - set(FINDINGS))
        if unknown or len(set(self.findings)) < len(self.findings):
            raise ValueError(f"findings must be known and named once; unknown: {unknown}")
        if self.optimiser == "adam" and self.weight_decay:
            raise ValueError("adam takes no weight_decay here; use adamw, which keeps it out of the gradient")
        return self


def read_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by the name of one in training/recipes, or by path.

    Raises:
        SpecError: no such recipe, not TOML, or a field is unknown, missing or out of range.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPES / f"{name_or_path}.toml"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
            raise SpecError(f"no recipe named {name_or_path!r}. There are {names}; or give a path to a .toml.")
    try:
        return Recipe.model_validate(read_toml(path))
    except ValidationError as err:
        raise SpecError(f"{path}: {describe(err)}. See training/recipes for examples.") from err
