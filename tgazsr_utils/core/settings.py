"""Hyper-parameters of training and of attacks: names, units, ranges. Epsilons and steps are in 1/255 here."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
)


def _not_a_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


def _of_255(value: Any) -> Any:
    found = re.fullmatch(r"\s*([\d.]+)\s*/\s*255(?:\.0*)?\s*", value) if isinstance(value, str) else None
    return found[1] if found else value


def _rising(value: list[float]) -> list[float]:
    if value != sorted(value):
        raise ValueError("the first share should be at most the second")
    return value


Number = BeforeValidator(_not_a_boolean)  # YAML reads "yes" and "on" as true, and true would be 1
Count = Annotated[int, Number, Field(ge=1, lt=2**63)]
Natural = Annotated[int, Number, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Number, Field(ge=0)]
Positive = Annotated[float, Number, Field(gt=0)]
Fraction = Annotated[float, Number, Field(gt=0, le=1)]
Share = Annotated[float, Number, Field(ge=0, le=1)]
Warmup = Annotated[list[Share], Field(min_length=2, max_length=2), AfterValidator(_rising)]
Of255 = BeforeValidator(_of_255)  # a number in 1/255; "8/255" is 8
Eps255 = Annotated[float, Number, Of255, Field(ge=0, le=255, description="1/255 of the pixel range")]
Length255 = Annotated[NonNegative, Of255]  # 1/255, of an l2 attack perhaps more than 255
Norm = Literal["linf", "l2"]  # of the perturbation
Precision = Literal["auto", "fp32", "amp_bf16", "fp16", "bf16"]  # see models.Numerics; "auto" is the loader's choice
Protocol = Literal["last", "worst"]  # robust at the attack's last iterate (as published), or at every one of them


class Settings(BaseModel):
    """Plain values that never change; unknown names and values out of range are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ObjectiveSettings(Settings):
    """What the loss terms need; as published Alpha 0.08, Beta 0.05, l2 at 224."""

    Alpha: NonNegative | None  # weight of L_AR; None, here and below: as the method was published
    Beta: NonNegative | None  # weight of L_AMC
    Distance_metric: Literal["l2", "l1", "cos"]  # of two attention maps
    attention_variant: Literal["reference", "cosine"]  # "reference": as released; "cosine": of unit vectors
    distance_size: Count = 224  # side in pixels at which maps are compared; Alpha and Beta belong to 224
    attention_backend: Literal["auto", "triton", "torch"] = "auto"  # what computes the maps; "auto": triton on CUDA


class FinetuneSettings(ObjectiveSettings):
    """One fine-tuning run, but for the method's name. What is None or not given: see ``Objective.with_preset``."""

    epochs: Count  # times that training sees each image
    batch_size: Count | None  # images of a training step
    lr: Positive | None  # learning rate at its highest, after warm-up and before cosine decay
    warmup_steps: Natural  # training steps in which the learning rate rises
    train_eps: Eps255 | None  # of the attack in training, 1/255
    train_stepsize: Eps255 | None  # 1/255
    train_numsteps: Natural | None  # steps of the attack in training
    last_num_ft: Natural = 0  # k: tunes the last k parameter tensors, in OpenAI's order; 0: the whole image encoder
    train_start: Literal["cut", "uncut"] | None = None  # "uncut": the attack's random start may leave [0,1]
    # [a, b]: no attack until this share of the steps, then epsilon and step size rise linearly until share b
    attack_warmup: Warmup | None = None
    optimizer: Literal["sgd", "adamw"] | None = None  # of training
    momentum: Annotated[float, Number, Field(ge=0, lt=1)] = 0.9  # of sgd
    weight_decay: NonNegative = 0.0  # of the optimizer
    seed: Natural  # of all that is random


ADDED_ATTACKS: set[str] = set()  # names of those that plugins have added to ``attacks.ATTACKS``


def exact_name(attack: Any) -> Any:
    """An attack's name as here: the original code has "CW", and means APGD-CE and APGD-DLR by "autoattack"."""
    name = attack.lower() if isinstance(attack, str) else attack
    return "apgd" if name == "autoattack" else name


class AttackSettings(Settings):
    """The attack that robust accuracy is measured with."""

    # of robust accuracy; those after "cw" are AutoAttack's (see measuring.autoattack); or one that a plugin adds
    attack: Literal["pgd", "cw", "apgd", "apgd-ce", "apgd-t", "standard", "square"] = "pgd"
    norm: Norm = "linf"  # l2: epsilon and step are Euclidean lengths of the whole perturbation, still in 1/255
    square_queries: Count = 5000  # of attack "square", for each image
    test_eps: Length255  # of the attack that is measured, 1/255
    test_stepsize: Length255  # 1/255
    test_numsteps: Count  # steps of that attack
    # "released-fp16": as the released code attacks, under fp16 autocast with the mean cross-entropy of 256 images
    attack_precision: Literal["model", "released-fp16"] = "model"

    @field_validator("test_eps", "test_stepsize")
    @classmethod
    def _within_the_pixel_range(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("norm") == "linf" and value > 255:
            raise ValueError("input should be less than or equal to 255")
        return value

    @field_validator("attack", mode="before")
    @classmethod
    def _by_its_exact_name(cls, value: Any) -> Any:
        return exact_name(value)

    @field_validator("attack_precision")
    @classmethod
    def _of_these_attacks(cls, value: str, info: ValidationInfo) -> str:
        if value != "model" and info.data.get("attack") not in ("pgd", "cw"):
            raise ValueError("is for the attacks pgd and cw")
        return value

    @field_validator("attack", mode="wrap")
    @classmethod
    def _or_an_added_one(cls, value: Any, check: Callable[[Any], str]) -> str:
        return value if isinstance(value, str) and value in ADDED_ATTACKS else check(value)

    @field_serializer("attack")
    def _as_it_is(self, value: str) -> str:
        return value

    @property
    def steps(self) -> int:
        """Of its own kind: "square" has queries."""
        return self.square_queries if self.attack == "square" else self.test_numsteps

    @property
    def label(self) -> str:
        """Such as "pgd-100", "square-5000", "standard"; with what is not usual: "pgd-10-l2", "pgd-10-released-fp16"."""
        unusual = [value for value in (self.norm, self.attack_precision) if value not in ("linf", "model")]
        steps = [] if self.attack == "standard" else [str(self.steps)]
        return "-".join([self.attack, *steps, *unusual])
