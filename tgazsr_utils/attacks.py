"""Adversarial images: what a bounded attacker adds to pixels so that zero-shot CLIP fails."""

import sys
from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Clip, ImageTokens
from .settings import AttackSettings, Norm, Protocol

AttackLoss = Callable[[ImageTokens], Tensor]
LogitLoss = Callable[[Tensor, Tensor], Tensor]  # of logits [B,C] and labels [B]; summed over the batch


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def cw_margin(logits: Tensor, labels: Tensor, confidence: float = 50.0) -> Tensor:
    """``-sum relu(correct - best wrong + confidence)`` (Carlini & Wagner 2017), zero once wrong leads by ``confidence``."""
    true = F.one_hot(labels, logits.shape[1]).bool()
    correct, wrong = logits[true], logits.masked_fill(true, -torch.inf).amax(1)
    return -F.relu(correct - wrong + confidence).sum()


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
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018): adversarial images ``[B,3,H,W]``.

    ``images`` ``[B,3,H,W]`` in [0,1]; ``labels`` ``[B]``; ``text`` ``[C,D]`` unit norm; ``eps`` and ``step_size`` in
    [0,1] pixel units (``norm`` "l2": of the whole image's Euclidean norm). Starts uniformly in the ball (``generator``,
    on the CPU, seeds it), then repeats ``x' = project(x' + step_size * direction)``, with direction sign(gradient), or
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
    start, ascend = (_linf if norm == "linf" else _l2)(images, eps, step_size)
    adversarial = start(generator)
    active = torch.arange(len(images), device=images.device)
    if protocol == "worst":
        with torch.no_grad():
            fooled = clip.logits(images, text).argmax(1) != labels
        adversarial[fooled] = images[fooled]
        active = active[~fooled]
    for _ in range(steps):
        if not len(active):
            break
        current = adversarial[active].requires_grad_(True)
        with torch.enable_grad():
            tokens = clip.encode_image(current)
            logits = None if loss else clip.similarity(tokens.pooled, text)
            value = loss(tokens) if loss else logit_loss(logits, labels[active])
            (gradient,) = torch.autograd.grad(value, current)
        if protocol == "worst":
            held = logits.argmax(1) == labels[active]
            active, current, gradient = active[held], current[held], gradient[held]
        adversarial[active] = ascend(current.detach(), gradient, active)
    return adversarial


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
    generator: torch.Generator | None = None,
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
    seed = int(torch.randint(2**31, (), generator=generator))
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
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Adversarial images by the attack that ``settings`` name, with their epsilon, norm, step size and steps."""
    options = {"version": settings.autoattack_version} if settings.attack == "autoattack" else {}
    return ATTACKS[settings.attack](
        clip, images, labels, text, settings.test_eps / 255, settings.test_stepsize / 255, settings.test_numsteps,
        norm=settings.norm, protocol=protocol, generator=generator, **options,
    )  # fmt: skip


def _check(images: Tensor, norm: str, **numbers: float) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"norm {norm!r} is unknown; choose 'linf' or 'l2'")
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    if images.numel() and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise ValueError(f"pixels range from {float(images.min()):g} to {float(images.max()):g}; attacks need [0, 1]")


Start = Callable[[torch.Generator | None], Tensor]
Ascend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the current images, their gradient and their rows in the batch


def _linf(images: Tensor, eps: float, step_size: float) -> tuple[Start, Ascend]:
    low, high = _ball(images, eps)

    def start(generator: torch.Generator | None) -> Tensor:
        noise = torch.rand(images.shape, generator=generator).to(images.device, images.dtype)
        return torch.clamp(images + eps * (2 * noise - 1), low, high)

    def ascend(current: Tensor, gradient: Tensor, rows: Tensor) -> Tensor:
        return torch.clamp(current + step_size * gradient.sign(), low[rows], high[rows])

    return start, ascend


def _l2(images: Tensor, eps: float, step_size: float) -> tuple[Start, Ascend]:
    norm = lambda x: torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, 1, 1, 1)
    unit = lambda x: x / norm(x).clamp(min=1e-12)

    def project(x: Tensor, rows: Tensor) -> Tensor:
        delta = x - images[rows]
        # Cutting to [0,1] moves each pixel towards the clean one, so the image stays in the ball.
        return (images[rows] + delta * (eps / norm(delta).clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)

    def start(generator: torch.Generator | None) -> Tensor:
        direction = torch.randn(images.shape, generator=generator)
        radius = torch.rand(len(images), generator=generator) ** (1 / images.shape[1:].numel())
        x = images + eps * (radius.view(-1, 1, 1, 1) * unit(direction)).to(images.device, images.dtype)
        return project(x, torch.arange(len(images), device=images.device))

    def ascend(current: Tensor, gradient: Tensor, rows: Tensor) -> Tensor:
        return project(current + step_size * unit(gradient), rows)

    return start, ascend


def _ball(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tightest representable pixel bounds of the eps-ball cut with [0,1]: rounding must not let a pixel out by an ulp."""
    low, high = (images.double() - eps).clamp(0, 1), (images.double() + eps).clamp(0, 1)
    inner_low, inner_high = low.to(images.dtype), high.to(images.dtype)
    inner_low = torch.where(inner_low.double() < low, torch.nextafter(inner_low, images), inner_low)
    inner_high = torch.where(inner_high.double() > high, torch.nextafter(inner_high, images), inner_high)
    return inner_low, inner_high
