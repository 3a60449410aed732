"""What each method trains: one short function per row of the published table.

An objective takes one training `Step` and gives its weighted terms; the loss is their sum. To add a method, write such
a function and decorate it with ``@objective(name, lr)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention_distance, text_guided_attention
from .models import Clip, ImageTokens
from .settings import ObjectiveSettings


class Term(NamedTuple):
    name: str
    weight: float
    value: Tensor  # scalar


@dataclass
class Step:
    """One batch as an objective sees it. Tokens are computed when first asked for and only once."""

    clip: Clip  # being tuned: f
    original: Clip  # frozen pre-trained copy: f0
    images: Tensor  # [B,3,H,W] in [0,1]: x
    adversarial: Tensor  # the same against f: x'
    labels: Tensor  # [B]
    text: Tensor  # [C,D] unit norm, one row a class

    @cached_property
    def adversarial_tokens(self) -> ImageTokens:
        """f(x')"""
        return self.clip.encode_image(self.adversarial)

    @cached_property
    def clean_tokens(self) -> ImageTokens:
        """f(x)"""
        return self.clip.encode_image(self.images)

    @cached_property
    def original_tokens(self) -> ImageTokens:
        """f0(x), without a graph"""
        with torch.no_grad():
            return self.original.encode_image(self.images)

    @property
    def true_text(self) -> Tensor:
        """t_y: the embedding ``[B,D]`` of each image's true class."""
        return self.text[self.labels]

    def cross_entropy(self, tokens: ImageTokens) -> Tensor:
        return F.cross_entropy(self.clip.similarity(tokens.pooled, self.text), self.labels)


@dataclass(frozen=True)
class Objective:
    name: str
    lr: float  # published learning rate
    terms: Callable[[Step, ObjectiveSettings], list[Term]]


OBJECTIVES: dict[str, Objective] = {}


def objective(name: str, lr: float) -> Callable:
    """Registers a loss function under its name, with the learning rate it was published with."""

    def register(terms: Callable[[Step, ObjectiveSettings], list[Term]]) -> Callable:
        OBJECTIVES[name] = Objective(name, lr, terms)
        return terms

    return register


def find_objective(name: str) -> Objective:
    """The objective of a name. Raises ValueError, with the names there are, for an unknown one."""
    if name not in OBJECTIVES:
        raise ValueError(f"method {name!r} is unknown; there are: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


@objective("TeCoA", lr=1e-5)
def tecoa(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """CE(logits(f, x'), y): text-guided contrastive adversarial training (Mao et al., ICLR 2023)."""
    return [Term("CE", 1.0, step.cross_entropy(step.adversarial_tokens))]


@objective("TGA-ZSR", lr=1e-4)
def tga_zsr(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """CE(logits(f, x'), y) + Alpha * L_AR + Beta * L_AMC (Yu et al., NeurIPS 2024).

    L_AR = mean ||A(f, x', t_y) - A(f0, x, t_y)|| brings attention on attacked images back to the original model's
    clean attention; L_AMC = mean ||A(f, x, t_y) - A(f0, x, t_y)|| keeps attention on clean images where it was.
    """
    attend = lambda tokens: text_guided_attention(
        tokens, step.true_text, settings.attention_variant, grid=step.clip.grid
    )
    distance = lambda a, b: attention_distance(a, b, settings.Distance_metric, settings.distance_size).mean()
    target = attend(step.original_tokens)
    return [
        Term("CE", 1.0, step.cross_entropy(step.adversarial_tokens)),
        Term("L_AR", settings.Alpha, distance(attend(step.adversarial_tokens), target)),
        Term("L_AMC", settings.Beta, distance(attend(step.clean_tokens), target)),
    ]
