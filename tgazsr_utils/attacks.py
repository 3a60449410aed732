"""Adversarial images: what a bounded attacker adds to pixels so that zero-shot CLIP fails."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import seeded
from .models import Clip, ImageTokens, encode
from .settings import AttackSettings, Norm, Protocol

AttackLoss = Callable[[ImageTokens], Tensor]
LogitLoss = Callable[[Tensor, Tensor], Tensor]  # of logits [B,C] and labels [B]; summed over the batch
Generators = torch.Generator | Sequence[torch.Generator] | None  # one for the batch, or one for each image


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def cw_margin(logits: Tensor, labels: Tensor, confidence: float = 50.0) -> Tensor:
    """``-sum relu(correct - best wrong + confidence)`` (Carlini & Wagner 2017), zero once wrong leads by ``confidence``."""
    true = F.one_hot(labels, logits.shape[1]).bool()
    correct, wrong = logits[true], logits.masked_fill(true, -torch.inf).amax(1)
    return -F.relu(correct - wrong + confidence).sum()


@torch.no_grad()  # but for the one gradient in _step, of the pixels alone
def pgd(
    clip: Clip,
    images: Tensor,
    labels: Tensor,
    text: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    *,
    norm: Norm = "linf",
    protocol: Protocol = "last",
    loss: AttackLoss | None = None,
    logit_loss: LogitLoss = summed_cross_entropy,
    generator: Generators = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018): adversarial images ``[B,3,H,W]``.

    ``images`` ``[B,3,H,W]`` in [0,1]; ``labels`` ``[B]``; ``text`` ``[C,D]`` unit norm; ``eps`` and ``step_size`` in
    [0,1] pixel units (``norm`` "l2": of the whole image's Euclidean norm). Starts uniformly in the ball (``generator`` seeds
    it; with one for each image, a start does not depend on the rest of the batch), then repeats ``x' = project(x' + step_size * direction)``, with direction sign(gradient), or
    gradient / ||gradient||_2 for l2, of ``logit_loss``, or of ``loss(tokens)`` if given. Only the pixels' gradient is
    taken. The result lies within ``eps`` of ``images`` (exactly for linf, up to rounding for l2) and inside [0,1].

    ``protocol`` "last" returns the last iterate. "worst" returns the first image of the clean one, the start and all
    iterates that is misclassified, and the last iterate where none is; what is fooled leaves the batch.

    Raises ValueError for pixels outside [0,1], a negative ``eps``, ``step_size`` or ``steps``, an unknown ``norm`` or
    ``protocol``, or "worst" with a ``loss`` of one's own, which knows whole batches only.
    """
    _check(images, norm, eps=eps, step_size=step_size, steps=steps)
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol {protocol!r} is unknown; choose 'last' or 'worst'")
    if loss is not None and protocol == "worst":
        raise ValueError("protocol 'worst' takes no loss of one's own: fooled images leave the batch that it is made for")
    if not len(images):
        return images
    adversarial = _random_start(images, eps, norm, generator)
    bounds = _ball(images, eps) if norm == "linf" else (images,)
    active = torch.arange(len(images), device=images.device)
    if protocol == "worst":
        fooled = clip.logits(images, text).argmax(1) != labels
        adversarial[fooled] = images[fooled]
        active = active[~fooled]
    for _ in range(steps):
        if protocol == "last":
            adversarial, _ = clip.run(_step, adversarial.requires_grad_(True), bounds, labels, text, eps, step_size, norm, loss, logit_loss)
        elif len(active):
            rows = adversarial[active].requires_grad_(True), tuple(bound[active] for bound in bounds), labels[active]
            moved, right = clip.run(_step, *rows, text, eps, step_size, norm, loss, logit_loss)
            active = active[right]
            adversarial[active] = moved[right]
    return adversarial


def _step(
    clip: Clip, current: Tensor, bounds: tuple[Tensor, ...], labels: Tensor, text: Tensor, eps: float, step_size: float, norm: Norm,
    loss: AttackLoss | None, logit_loss: LogitLoss,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of ``pgd`` from ``current``, which requires a gradient: images one step on, and which ``[B]`` of ``current`` are
    classified right."""
    with torch.enable_grad():
        tokens = encode(clip, current)
        logits = clip.similarity(tokens.pooled, text)
        value = logit_loss(logits, labels) if loss is None else loss(tokens)
        (gradient,) = torch.autograd.grad(value, current)
    if norm == "linf":
        moved = torch.clamp(current + step_size * gradient.sign(), *bounds)
    else:
        moved = _project_l2(current + step_size * _unit(gradient), *bounds, eps)
    return moved, logits.argmax(1) == labels


def cw(clip: Clip, images: Tensor, labels: Tensor, text: Tensor, eps: float, step_size: float, steps: int, **options) -> Tensor:
    """PGD on the margin ``-sum relu(correct - best wrong + 50)`` in place of cross-entropy; the rest: see ``pgd``."""
    return pgd(clip, images, labels, text, eps, step_size, steps, logit_loss=cw_margin, **options)


def autoattack(
    clip: Clip,
    images: Tensor,
    labels: Tensor,
    text: Tensor,
    eps: float,
    step_size: float | None = None,
    steps: int = 100,
    *,
    version: str = "apgd",
    norm: Norm = "linf",
    protocol: Protocol = "worst",
    generator: Generators = None,
) -> Tensor:
    """AutoAttack (Croce & Hein 2020) by pyautoattack: adversarial images ``[B,3,H,W]``, the clean one where none fools.

    ``version`` "apgd", as published for this method: APGD-CE, then APGD-DLR on what withstood it (with two classes
    APGD-CE alone, since DLR needs three), each of ``steps`` iterations from one random start; "standard": the authors' full
    ensemble APGD-CE, targeted APGD-DLR, targeted FAB and Square (5000 queries), each with as many target classes
    as there are, at most 9. It chooses its own step sizes and keeps the first image that fools: ``step_size`` and
    ``protocol`` are not used. Raises ValueError for bad pixels, ``eps`` or ``steps``, and for "standard" with fewer than four classes.
    """
    from pyautoattack import AutoAttack  # slow to import, and rarely needed

    _check(images, norm, eps=eps, steps=steps)
    classes = len(text)
    if not len(images):
        return images
    if version == "standard" and classes < 4:
        raise ValueError(f"AutoAttack's standard version needs at least 4 classes (targeted DLR); there are {classes}")
    first = generator[0] if isinstance(generator, Sequence) else generator
    seed = int(torch.randint(2**31, (), generator=first, device=None if first is None else first.device))
    options = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "seed": seed, "device": images.device}
    model = _Logits(clip, text)
    if version == "standard":
        attack = AutoAttack(model, version="standard", **options)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    elif version == "apgd":
        attack = AutoAttack(model, version="custom", attacks=["apgd-ce", "apgd-dlr"][: 1 if classes < 3 else 2], **options)
        attack.apgd = type(attack.apgd)(model, n_iter=steps, n_restarts=1, logger=attack.logger, **options)
    else:
        raise ValueError(f"AutoAttack version {version!r} is unknown; choose 'apgd' or 'standard'")
    attack.logger.setLevel("ERROR")  # its warnings repeat for each batch, and one is wrong for three classes
    tracer = sys.gettrace()
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):  # it seeds the global generator
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    sys.settrace(tracer)  # and switches tracing off, debuggers' too
    return torch.clamp(adversarial, *_ball(images, eps)) if norm == "linf" else adversarial.clamp(0, 1)


class _Logits(nn.Module):
    """Pixels to logits, as attack libraries want a model."""

    def __init__(self, clip: Clip, text: Tensor):
        super().__init__()
        self.clip, self.text = clip, text

    def forward(self, pixels: Tensor) -> Tensor:
        return self.clip.logits(pixels, self.text)


ATTACKS = {"pgd": pgd, "cw": cw, "autoattack": autoattack}


def attack_as_set(
    clip: Clip, images: Tensor, labels: Tensor, text: Tensor, settings: AttackSettings, protocol: Protocol,
    generator: Generators,
) -> Tensor:  # fmt: skip
    """Adversarial images by the attack that ``settings`` name, with their epsilon, norm, step size and steps."""
    options = {"version": settings.autoattack_version} if settings.attack == "autoattack" else {}
    return ATTACKS[settings.attack](
        clip, images, labels, text, settings.test_eps / 255, settings.test_stepsize / 255, settings.test_numsteps,
        norm=settings.norm, protocol=protocol, generator=generator, **options,
    )  # fmt: skip


def generators(device: torch.device, rows: Iterable[int], *parts: Any) -> list[torch.Generator]:
    """One for each image, seeded by its row and ``parts``."""
    return [seeded(device, *parts, row) for row in rows]


def _check(images: Tensor, norm: str, **numbers: float) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"norm {norm!r} is unknown; choose 'linf' or 'l2'")
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    if images.numel() and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise ValueError(f"pixels range from {float(images.min()):g} to {float(images.max()):g}; attacks need [0, 1]")


def _random_start(images: Tensor, eps: float, norm: Norm, generator: Generators) -> Tensor:
    """Uniform in the eps-ball around each image, cut with [0,1]; drawn where the generators are."""

    def draw(kind: Callable[..., Tensor], *shape: int) -> Tensor:
        if isinstance(generator, Sequence):
            drawn = torch.stack([kind(shape, generator=one, device=one.device) for one in generator])
        else:
            drawn = kind((len(images), *shape), generator=generator, device=None if generator is None else generator.device)
        return drawn.to(images.device, images.dtype)

    if norm == "linf":
        return torch.clamp(images + eps * (2 * draw(torch.rand, *images.shape[1:]) - 1), *_ball(images, eps))
    direction = _unit(draw(torch.randn, *images.shape[1:]))
    radius = draw(torch.rand, 1, 1, 1) ** (1 / images.shape[1:].numel())
    return _project_l2(images + eps * radius * direction, images, eps)


def _length(x: Tensor) -> Tensor:
    """Euclidean norm ``[B,1,1,1]`` of each image, never zero."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)


def _unit(x: Tensor) -> Tensor:
    return x / _length(x)


def _project_l2(x: Tensor, images: Tensor, eps: float) -> Tensor:
    """Into the l2 ball, then into [0,1]: that moves each pixel towards the clean one, so the image stays in the ball."""
    delta = x - images
    return (images + delta * (eps / _length(delta)).clamp(max=1)).clamp(0, 1)


def _ball(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tightest representable pixel bounds of the eps-ball cut with [0,1]: rounding must not let a pixel out by an ulp."""
    low, high = (images.double() - eps).clamp(0, 1), (images.double() + eps).clamp(0, 1)
    inner_low, inner_high = low.to(images.dtype), high.to(images.dtype)
    inner_low = torch.where(inner_low.double() < low, torch.nextafter(inner_low, images), inner_low)
    inner_high = torch.where(inner_high.double() > high, torch.nextafter(inner_high, images), inner_high)
    return inner_low, inner_high
