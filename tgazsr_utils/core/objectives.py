"""What each method trains: one short function per row of the published table.

An objective takes one training `Step` and gives its weighted terms; the loss is their sum. To add a method, write such
a function and decorate it with ``@objective(name, lr=...)``. Methods published since are in ``core.frontier``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.attacks import AttackLoss
from tgazsr_utils.core.attention import (
    Target,
    attention_distance,
    complementary_attention,
    grad_cam_scores,
    min_max_at,
    text_guided_attention,
)
from tgazsr_utils.core.images import Batch, ImageSet
from tgazsr_utils.core.models import Clip, ImageTokens
from tgazsr_utils.core.settings import FinetuneSettings, ObjectiveSettings


class Term(NamedTuple):
    name: str
    weight: float
    value: Tensor  # scalar


def weighted_sum(terms: list[Term]) -> Tensor:
    """The loss: the weighted sum of its terms."""
    return sum((term.weight * term.value for term in terms), torch.zeros(()))


@dataclass
class Step:
    """One batch as an objective sees it. Tokens are computed when first asked for and only once."""

    clip: Clip  # being tuned: f
    original: Clip  # frozen pre-trained copy: f0
    images: Tensor  # [B,3,H,W] in [0,1]: x
    labels: Tensor  # [B]: y
    prompts: tuple[str, ...]  # one a class
    adversarial: Tensor | None = None  # images attacked against f: x'; the very same images where nothing attacks
    rows: Tensor | None = None  # [B] of the images in the training set
    cache: "Cache | None" = None  # of what f0 makes of clean images, if there is one
    captions: tuple[str, ...] | None = None  # [B], where the set has some
    descriptions: tuple[tuple[str, ...], ...] | None = None  # equally many a class, where the set has some

    @classmethod
    def of(cls, data: ImageSet, batch: Batch, clip: Clip, original: Clip, cache: "Cache | None" = None) -> "Step":
        """Of a batch of a set, with the texts that come with it."""
        texts = data.captions_of(batch.rows), data.descriptions
        return cls(clip, original, batch.images, batch.labels, data.prompts, None, batch.rows, cache, *texts)

    @cached_property
    def text(self) -> Tensor:
        """Unit-norm embeddings ``[C,D]`` of the classes' prompts."""
        return self.original.encode_text(self.prompts)

    @property
    def true_text(self) -> Tensor:
        """t_y: the embedding ``[B,D]`` of each image's true class."""
        return self.text[self.labels]

    @property
    def not_text(self) -> Tensor:
        """t_not_y: the embedding ``[B,D]`` of what each image is not, "This is not a photo of a ..."."""
        return self.original.encode_text([negated(prompt) for prompt in self.prompts])[self.labels]

    @cached_property
    def caption_text(self) -> Tensor:
        """Embeddings ``[B,D]`` of the images' captions; without captions t_y."""
        return self.true_text if self.captions is None else self.original.encode_text(self.captions)

    @cached_property
    def described(self) -> Tensor:
        """Embeddings ``[C,n,D]`` of the classes' descriptions. Raises ValueError where there are none."""
        if self.descriptions is None:
            raise ValueError("this set has no descriptions of its classes: ImageSet.descriptions has n texts a class")
        texts = [text for of_class in self.descriptions for text in of_class]
        return self.original.encode_text(texts).unflatten(0, (len(self.descriptions), -1))

    @cached_property
    def adversarial_tokens(self) -> ImageTokens:
        """f(x')"""
        return self.clean_tokens if self.adversarial is self.images else self.clip.encode_image(self.adversarial)

    @cached_property
    def clean_tokens(self) -> ImageTokens:
        """f(x)"""
        return self.clip.encode_image(self.images)

    @cached_property
    def original_tokens(self) -> ImageTokens:
        """f0(x), without a graph"""
        with torch.no_grad():
            return self.original.encode_image(self.images)

    @cached_property
    def original_adversarial_tokens(self) -> ImageTokens:
        """f0(x'), without a graph"""
        with torch.no_grad():
            return self.original.encode_image(self.adversarial)

    def tokens(self, side: str) -> ImageTokens:
        """Those of the side "adversarial" (f(x')), "clean" (f(x)) or "original" (f0(x))."""
        return getattr(self, f"{side}_tokens")

    def encode_both(self) -> None:
        """Computes f(x') and f(x) in one forward, for an objective that needs both."""
        if self.adversarial is not self.images:
            both = self.clip.encode_image(torch.cat([self.adversarial, self.images]))
            halves = zip(*(tokens.chunk(2) for tokens in both))
            self.adversarial_tokens, self.clean_tokens = (ImageTokens(*half) for half in halves)

    @cached_property
    def untouched(self) -> bool:
        """Is f still f0, as at the first step? Looked at from the end, where what is tuned differs at once."""
        pairs = zip(self.clip.visual.parameters(), self.original.visual.parameters())
        return all(torch.equal(tuned, original) for tuned, original in reversed(list(pairs)))

    def cached_original(self, name: str, compute: "Compute") -> Tensor:
        """``compute(step)``, which must depend on f0, clean images and labels alone; once an image with a cache."""
        with torch.no_grad():
            return compute(self) if self.cache is None else self.cache(name, compute, self.rows)

    def cross_entropy(self, tokens: ImageTokens) -> Tensor:
        """CE of the zero-shot logits, mean over the batch."""
        return F.cross_entropy(self.clip.similarity(tokens.pooled, self.text), self.labels)


Compute = Callable[[Step], Tensor]
Cache = Callable[[str, Compute, Tensor | None], Tensor]  # (name, how it is computed, rows) -> its values of these rows


def negated(prompt: str) -> str:
    """The negation of "This is a photo of a cat" and of "A photo of a cat": "This is not a photo of a cat".

    Also of "Tthis is a photo ...", as a published prompt has it. Raises ValueError for a prompt of another beginning.
    """
    changed, count = re.subn(r"^(t?this is )?an? ", "This is not a ", prompt, flags=re.IGNORECASE)
    if not count:
        raise ValueError(f"prompt {prompt!r} has no known negation: it should begin with 'This is a', 'A' or 'An'")
    return changed


TrainingAttack = Callable[[Step], AttackLoss | None]
# What TGA-ZSR was published with, and every other method where nothing else is said.
PRESET: dict[str, Any] = {
    "lr": 1e-4,
    "Alpha": 0.08,
    "Beta": 0.05,
    "train_eps": 1.0,
    "train_stepsize": 1.0,
    "train_numsteps": 2,
    "train_start": "cut",
    "batch_size": 128,
    "optimizer": "sgd",
    "weight_decay": 0.0,
}


def cross_entropy_attack(step: Step) -> None:
    """The batch's summed cross-entropy over the class prompts: ``attacks.pgd``'s own loss, which it takes for None."""


def original_pooled(step: Step) -> Tensor:
    """f0(x): class embeddings ``[B,D]``, not normalised."""
    return step.original_tokens.pooled


def embedding_attack(step: Step) -> AttackLoss:
    """The squared l2 distance to the original model's clean class embedding; no labels."""
    target = step.cached_original("pooled", original_pooled)
    return lambda tokens: (tokens.pooled - target).square().sum()


@dataclass(frozen=True)
class Objective:
    name: str
    terms: Callable[[Step, ObjectiveSettings], list[Term]]
    # What the training attack maximises on f's tokens; None: it trains on clean images.
    attack: TrainingAttack | None = cross_entropy_attack
    preset: Mapping[str, Any] = field(default_factory=lambda: PRESET)  # hyper-parameters it was published with
    reads: tuple[str, ...] = ()  # of the texts that may come with a set: "captions", "descriptions"
    whole_batch: bool = False  # what the attack maximises compares the batch's images, and must see all of them

    def with_preset(self, settings: FinetuneSettings) -> FinetuneSettings:
        """The settings, with what is None or was not given as published."""
        given = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
        return settings.model_copy(update={name: v for name, v in self.preset.items() if name not in given})


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str,
    *,
    attack: TrainingAttack | None = cross_entropy_attack,
    reads: tuple[str, ...] = (),
    whole_batch: bool = False,
    **preset: Any,
) -> Callable:
    """Registers a loss function under its name, with what its training attack maximises and its published settings.

    What ``attack`` maximises must be a sum over images, as it may see a part of the batch; unless it needs the
    ``whole_batch``. ``reads``: see ``Objective``. Raises ValueError for a setting that is none of ``FinetuneSettings``.
    """
    known = FinetuneSettings.model_fields
    if unknown := sorted(preset.keys() - known):
        raise ValueError(f"setting {unknown[0]!r} of {name} is unknown; there are: {', '.join(known)}")

    def register(terms: Callable[[Step, ObjectiveSettings], list[Term]]) -> Callable:
        OBJECTIVES[name] = Objective(name, terms, attack, PRESET | preset, reads, whole_batch)
        return terms

    return register


def find_objective(name: str) -> Objective:
    """The objective of a name. Raises ValueError, with the names there are, for an unknown one."""
    if name == "CLIP":
        raise ValueError("method 'CLIP' is the untuned model, which trains nothing and is measured beside all others")
    if name not in OBJECTIVES:
        raise ValueError(f"method {name!r} is unknown; there are: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


@objective("FT-Clean", attack=None)
def ft_clean(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """Symmetric in-batch contrastive loss on clean images: image-to-text and text-to-image CE, halved."""
    return [Term("L_con", 1.0, contrastive(step.clip.similarity(step.clean_tokens.pooled, step.true_text)))]


@objective("FT-Adv.")
def ft_adv(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """The same loss on attacked images."""
    return [Term("L_con", 1.0, contrastive(step.clip.similarity(step.adversarial_tokens.pooled, step.true_text)))]


def contrastive(logits: Tensor) -> Tensor:
    """Image-to-text and text-to-image CE, halved, of ``[B,B]``: each image against each one's text."""
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@objective("TeCoA", lr=1e-5)
def tecoa(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """CE(logits(f, x'), y): text-guided contrastive adversarial training (Mao et al., ICLR 2023)."""
    return [Term("CE", 1.0, step.cross_entropy(step.adversarial_tokens))]


def cosine_attack(step: Step) -> AttackLoss:
    """The batch's summed cross-entropy of bare cosines, temperature 1."""
    return lambda tokens: F.cross_entropy(cosines(tokens.pooled, step.text), step.labels, reduction="sum")


def cosines(pooled: Tensor, text: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[B,C]`` of class embeddings ``[B,D]``, not normalised, and unit-norm texts ``[C,D]``."""
    return F.normalize(pooled.to(dtype), dim=-1) @ text.to(dtype).T


@objective("PMG-AFT", attack=cosine_attack, lr=5e-5, batch_size=256)
def pmg_aft(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """CE(f, x') + KL(p_f0(x') || p_f(x')) + KL(p_f(x) || p_f(x')), each KL summed over the batch (CVPR 2024).

    As released the text is normalised once more after the temperature was applied, so that every logit, the attack's
    too, is a bare cosine.
    """
    return _pre_trained_guided(step, lambda step, tokens: cosines(tokens.pooled, step.text), "sum")


@objective("PMG-AFT-scaled", lr=5e-5, batch_size=256)
def pmg_aft_scaled(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """PMG-AFT as its paper reads: logits with CLIP's temperature, each KL averaged over the batch."""
    return _pre_trained_guided(step, lambda step, tokens: step.clip.similarity(tokens.pooled, step.text), "batchmean")


def _pre_trained_guided(step: Step, logits: Callable[[Step, ImageTokens], Tensor], reduction: str) -> list[Term]:
    step.encode_both()
    attacked = logits(step, step.adversarial_tokens)
    of = attacked.double().log_softmax(1)  # double: a divergence of bare cosines is what is left of much larger terms
    divergence = lambda p: F.kl_div(of, p.double().softmax(1), reduction=reduction).float()  # KL(p || attacked)
    return [
        Term("CE", 1.0, F.cross_entropy(attacked, step.labels)),
        Term("L_general", 1.0, divergence(logits(step, step.original_adversarial_tokens))),
        Term("L_clean", 1.0, divergence(logits(step, step.clean_tokens))),
    ]


@objective("FARE", attack=embedding_attack)
def fare(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """Batch mean of ||f(x') - f0(x)||^2 between unnormalised class embeddings; no labels (ICML 2024)."""
    distance = (step.adversarial_tokens.pooled - step.cached_original("pooled", original_pooled)).square().sum(1).mean()
    return [Term("L_emb", 1.0, distance)]


# The same loss as its authors' own code (RobustVLM) trains it.
objective(
    "FARE-RobustVLM",
    attack=embedding_attack,
    optimizer="adamw",
    lr=1e-5,
    weight_decay=1e-4,
    train_eps=2.0,
    train_numsteps=10,
    train_start="uncut",
)(fare)


@objective("Vision-based")
def vision_based(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """TGA-ZSR with Grad-CAM maps in place of text-guided ones, each of the best among the batch's own classes.

    As released no gradient flows through these, so that it trains as TeCoA does at this learning rate.
    """
    return attention_regularised(step, settings, lambda step, side: _grad_cam(step, side, settings, "batch"))


@objective("Vision-based-grad")
def vision_based_differentiable(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """The same with Grad-CAM maps of the true class, which train the weights."""
    attend = lambda step, side: _grad_cam(step, side, settings, "true", differentiable=side != "original")
    return attention_regularised(step, settings, attend, cached="grad-cam")


def _grad_cam(
    step: Step, side: str, settings: ObjectiveSettings, target: Target, differentiable: bool = False
) -> Tensor:
    clip = step.original if side == "original" else step.clip
    images = step.adversarial if side == "adversarial" else step.images
    return min_max_at(
        grad_cam_scores(clip, images, step.text, step.labels, target, differentiable), settings.distance_size
    )


@objective("TGA-ZSR")
def tga_zsr(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """CE(logits(f, x'), y) + Alpha * L_AR + Beta * L_AMC (Yu et al., NeurIPS 2024).

    L_AR = mean ||A(f, x', t_y) - A(f0, x, t_y)|| brings attention on attacked images back to the original model's
    clean attention; L_AMC = mean ||A(f, x, t_y) - A(f0, x, t_y)|| keeps attention on clean images where it was.
    """
    step.encode_both()
    variant, backend = settings.attention_variant, settings.attention_backend
    attend = lambda step, side: text_guided_attention(
        step.tokens(side), step.true_text, variant, grid=step.clip.grid, backend=backend
    )
    return attention_regularised(step, settings, attend, cached=f"text-{variant}")


@objective("Comp-TGA", Alpha=0.10, Beta=0.07)
def comp_tga(step: Step, settings: ObjectiveSettings) -> list[Term]:
    """TGA-ZSR with A = A(t_y) * (1 - A(t_not_y)), t_not_y from "This is not a photo of a ..." (TPAMI 2026).

    Both maps at the image's size, then multiplied.
    """
    step.encode_both()
    variant, backend = settings.attention_variant, settings.attention_backend
    attend = lambda step, side: complementary_attention(
        step.tokens(side), step.true_text, step.not_text, variant, "nodes", grid=step.clip.grid, backend=backend
    )
    return attention_regularised(step, settings, attend, cached=f"complementary-{variant}", degree=2)


def attention_regularised(
    step: Step,
    settings: ObjectiveSettings,
    attend: Callable[[Step, str], Tensor],
    *,
    cached: str | None = None,
    degree: Literal[1, 2] = 1,
    classify: Callable[[Step, ImageTokens], Tensor] = Step.cross_entropy,
) -> list[Term]:
    """CE + Alpha * L_AR + Beta * L_AMC from ``attend(step, side)``: maps A(f, x') of the side "adversarial", A(f, x) of
    "clean" and A(f0, x) of "original", which are cached under the name ``cached`` if they depend on single images.
    ``classify(step, tokens)`` is the CE.

    While f is f0, what compares the same images is exactly zero: the norm would make a gradient of full size of a
    rounding.
    """
    # Before the maps: the order of sums shows in the last bits.
    cross_entropy = classify(step, step.adversarial_tokens)
    of_original = lambda batch: attend(batch, "original")
    target = step.cached_original(cached, of_original) if cached else of_original(step)
    same = {"clean": True, "adversarial": torch.equal(step.adversarial, step.images)} if step.untouched else {}
    distance = lambda side: attention_distance(
        attend(step, side), target, settings.Distance_metric, settings.distance_size, degree
    ).mean()
    L_AR, L_AMC = (0 * cross_entropy if same.get(side) else distance(side) for side in ("adversarial", "clean"))
    return [Term("CE", 1.0, cross_entropy), Term("L_AR", settings.Alpha, L_AR), Term("L_AMC", settings.Beta, L_AMC)]
