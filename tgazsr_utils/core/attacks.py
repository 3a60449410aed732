"""Adversarial images: what a bounded attacker adds to pixels so that zero-shot CLIP fails."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.defences import Guard
from tgazsr_utils.core.images import ball
from tgazsr_utils.core.models import Clip, ImageTokens, encode
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import AttackSettings, Norm, Protocol

AttackLoss = Callable[[ImageTokens], Tensor]
LogitLoss = Callable[[Tensor, Tensor], Tensor]  # of logits [B,C] and labels [B]; summed over the batch
Generator = torch.Generator | Noise | None  # of a batch's random start


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def cw_margin(logits: Tensor, labels: Tensor, confidence: float = 50.0) -> Tensor:
    """``-sum relu(correct - best wrong + confidence)`` (Carlini & Wagner 2017); zero once wrong leads by that much."""
    true = labels[:, None]
    correct, wrong = logits.gather(1, true)[:, 0], logits.scatter(1, true, -torch.inf).amax(1)
    return -F.relu(correct - wrong + confidence).sum()


@torch.no_grad()  # _step alone turns gradients on, of the pixels
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
    start: Literal["cut", "uncut"] = "cut",
    loss: AttackLoss | None = None,
    logit_loss: LogitLoss = summed_cross_entropy,
    generator: Generator = None,
    trusted: bool = False,
    guard: Guard | None = None,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018): adversarial images ``[B,3,H,W]``.

        x'_0 uniform in the eps-ball around x,   x'_(k+1) = project(x'_k + step_size * direction(gradient of the loss))

    ``direction`` is the sign for ``norm`` "linf" and gradient / ||gradient||_2 for "l2"; the loss is ``logit_loss``,
    or ``loss(tokens)`` if given. ``images`` x ``[B,3,H,W]`` in [0,1]; ``labels`` ``[B]``; ``text`` ``[C,D]`` unit
    norm; ``eps`` and ``step_size`` in [0,1] pixel units (l2: lengths of the whole perturbation). ``generator`` makes
    the start, ``seeds.Noise`` one that does not depend on the rest of the batch. Only the pixels' gradient is taken.
    The result lies within ``eps`` of ``images`` (exactly for linf, up to rounding for l2) and inside [0,1]; with
    ``start`` "uncut" the start itself may leave [0,1], the images after the first step do not.

    ``protocol`` "last" returns the last iterate. "worst" returns the first image of the clean one, the start and all
    iterates that is misclassified, and the last iterate where none is; what is fooled leaves the batch.

    With a ``guard`` the attack knows of a defence: gradients, and what is misclassified, are of the images behind it.

    Raises ValueError for pixels outside [0,1], unless they are ``trusted``; a negative ``eps``, ``step_size`` or
    ``steps``; an unknown ``norm``, ``protocol`` or ``start``; "worst" with an "uncut" start or with a ``loss`` of one's
    own, which knows whole batches only.
    """
    check_arguments(images[:0] if trusted else images, norm, protocol, start, eps=eps, step_size=step_size, steps=steps)
    if protocol == "worst" and loss is not None:
        raise ValueError("protocol 'worst' takes no loss of one's own: fooled images leave the batch it is made for")
    if not len(images):
        return images
    bounds = clip.run(ball, images, _scalar(eps)) if norm == "linf" else (images,)
    adversarial = _start(images, eps, bounds if start == "cut" or not steps else None, norm, generator)
    ascent = _Ascent(text, _scalar(eps), _scalar(step_size), loss, logit_loss, bounds, labels, guard)
    with clip.frozen():
        if protocol == "worst":
            return _first_that_fools(clip, images, adversarial, ascent, steps)
        return _last_iterate(clip, adversarial, ascent, steps)


class _Ascent(NamedTuple):
    """What is the same at every step of ``pgd``; lengths as tensors, of which one graph takes any."""

    text: Tensor
    eps: Tensor
    step_size: Tensor
    loss: AttackLoss | None
    logit_loss: LogitLoss
    bounds: tuple[Tensor, ...]  # the lowest and the highest pixels; for l2 the images
    labels: Tensor
    guard: Guard | None

    def of(self, rows: Tensor) -> "_Ascent":
        """For these images of the batch alone."""
        bounds, guard = tuple(bound[rows] for bound in self.bounds), self.guard and self.guard.of(rows)
        return self._replace(bounds=bounds, labels=self.labels[rows], guard=guard)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


ROUND = 4  # steps


def _last_iterate(clip: Clip, current: Tensor, ascent: _Ascent, steps: int) -> Tensor:
    """``pgd`` under protocol "last".

    A batch that is, to the bit, what it was a round before repeats itself, as sign steps as long as eps soon do: what
    is left of whole rounds changes nothing, and is left out.
    """
    left, before = steps, current
    while left:
        current, left = _step(clip, current, ascent)[0], left - 1
        if left >= ROUND and (steps - left) % ROUND == 0 and ascent.guard is None:
            left = left % ROUND if torch.equal(current, before) else left
            before = current
    return current


def _first_that_fools(clip: Clip, images: Tensor, adversarial: Tensor, ascent: _Ascent, steps: int) -> Tensor:
    """``pgd`` under protocol "worst"."""
    fooled = (ascent.guard or clip).logits(images, ascent.text).argmax(1) != ascent.labels
    adversarial = torch.where(fooled[:, None, None, None], images, adversarial)
    active = (~fooled).nonzero().flatten()
    while steps and len(active):
        moved, right = _step(clip, adversarial[active], ascent.of(active))
        active, steps = active[right], steps - 1
        adversarial[active] = moved[right]
    return adversarial


def _step(clip: Clip, current: Tensor, ascent: _Ascent) -> tuple[Tensor, Tensor]:
    """One step of ``pgd`` from ``current``: the next images, and which were right."""
    with torch.enable_grad():
        current = current.detach().requires_grad_(True)
        if ascent.guard is None:
            gradient, logits = _pixel_gradient(clip, current, current, ascent)
        else:
            found = [_pixel_gradient(clip, current, seen, ascent) for seen in ascent.guard.draws(current)]
            gradient = torch.stack([gradient for gradient, _ in found]).mean(0)
            logits = torch.stack([logits for _, logits in found[: ascent.guard.number]]).mean(0)
    moved = clip.run(_moved, current.detach(), gradient, ascent.step_size, ascent.eps, *ascent.bounds)
    return moved, logits.argmax(1) == ascent.labels


def _moved(current: Tensor, gradient: Tensor, step_size: Tensor, eps: Tensor, *bounds: Tensor) -> Tensor:
    if len(bounds) == 2:
        return torch.clamp(current + step_size * gradient.sign(), *bounds)
    return _project_l2(current + step_size * _unit(gradient), bounds[0], eps)


def _pixel_gradient(clip: Clip, current: Tensor, seen: Tensor, ascent: _Ascent) -> tuple[Tensor, Tensor]:
    """The gradient by ``current`` of the loss of what the model sees then, and its logits."""
    tokens = encode(clip, seen)
    logits = clip.similarity(tokens.pooled, ascent.text)
    value = ascent.logit_loss(logits, ascent.labels) if ascent.loss is None else ascent.loss(tokens)
    (gradient,) = torch.autograd.grad(value, current)
    return gradient, logits.detach()


def cw(
    clip: Clip, images: Tensor, labels: Tensor, text: Tensor, eps: float, step_size: float, steps: int, **options
) -> Tensor:
    """PGD on the margin ``-sum relu(correct - best wrong + 50)`` in place of cross-entropy; the rest: see ``pgd``."""
    return pgd(clip, images, labels, text, eps, step_size, steps, logit_loss=cw_margin, **options)


class Attack(NamedTuple):
    """One of ``ATTACKS``."""

    run: Callable[..., Tensor]  # with the arguments of ``pgd``
    keeps_first: bool = False  # it keeps the first image that fools: it knows no other protocol than "worst"
    batch: int | None = None  # images it always has at once, where its random draws are for a batch
    takes_guard: bool = False  # it can go through a defence


ATTACKS = {name: Attack(run, takes_guard=True) for name, run in (("pgd", pgd), ("cw", cw))}
# ``measuring.autoattack`` adds its own


def check_guarded(attack: str) -> None:
    """Raises ValueError for an attack that cannot go through a defence."""
    if not ATTACKS[attack].takes_guard:
        able = " or ".join(repr(name) for name, one in ATTACKS.items() if one.takes_guard)
        raise ValueError(f"attack {attack!r} does not go through a defence, which says nothing then; choose {able}")


def run_attack(
    clip: Clip,
    images: Tensor,
    labels: Tensor,
    text: Tensor,
    settings: AttackSettings,
    protocol: Protocol,
    generator: Generator,
    guard: Guard | None = None,
) -> Tensor:
    """Adversarial images ``[B,3,H,W]`` by the attack that ``settings`` name, of images that must be in [0,1]."""
    options: dict[str, Any] = {"norm": settings.norm, "protocol": protocol, "generator": generator}
    if guard is not None:
        check_guarded(settings.attack)
        options["guard"] = guard
    run = ATTACKS[settings.attack].run
    if run in (pgd, cw):
        options["trusted"] = True  # to see it would wait for the device
    if settings.attack_precision == "released-fp16":
        clip, run = clip.under_autocast("amp_fp16"), functools.partial(_as_released, run)
    eps, step_size = settings.test_eps / 255, settings.test_stepsize / 255
    return run(clip, images, labels, text, eps, step_size, settings.steps, **options)


RELEASED_BATCH = 256  # images that the released code attacks at once


def _as_released(run: Callable[..., Tensor], clip: Clip, images: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Under fp16 autocast throughout, the mean cross-entropy of a batch as released and no scaling of the loss.

    So gradients below fp16's smallest number are zero, and those of images with a small loss are so small.
    """
    if options["protocol"] != "last":
        raise ValueError("attack_precision 'released-fp16' is read at the last iterate, protocol 'last'")
    if run is pgd:
        options["logit_loss"] = lambda logits, labels: summed_cross_entropy(logits, labels) / RELEASED_BATCH
    with torch.autocast(images.device.type, torch.float16):
        return run(clip, images, *arguments, **options)


def check_arguments(images: Tensor, norm: str, protocol: str = "last", start: str = "cut", **numbers: float) -> None:
    if start not in ("cut", "uncut") or (start, protocol) == ("uncut", "worst"):
        raise ValueError(f"start {start!r} is unknown; choose 'cut', or 'uncut' where protocol is 'last'")
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol {protocol!r} is unknown; choose 'last' or 'worst'")
    if norm not in get_args(Norm):
        raise ValueError(f"norm {norm!r} is unknown; choose 'linf' or 'l2'")
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    if images.numel() and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise ValueError(f"pixels range from {float(images.min()):g} to {float(images.max()):g}; attacks need [0, 1]")


def _start(images: Tensor, eps: float, cut: tuple[Tensor, ...] | None, norm: Norm, generator: Generator) -> Tensor:
    """Uniform in the eps-ball around each image, perhaps ``cut`` with bounds; drawn where the generator is."""

    def draw(count: int) -> Tensor:  # uniform in [0,1), [B,count]
        if isinstance(generator, Noise):
            return generator.uniform(count).to(images.device, images.dtype)
        device = images.device if generator is None else generator.device
        return torch.rand(len(images), count, generator=generator, device=device).to(images.device, images.dtype)

    values = images.shape[1:].numel()
    if norm == "linf":
        start = images + eps * (2 * draw(values).view_as(images) - 1)
        return start if cut is None else torch.clamp(start, *cut)
    drawn, radius = draw(values + 1).split([values, 1], dim=1)
    direction = _unit(torch.erfinv((2 * drawn - 1).clamp(2**-24 - 1, 1 - 2**-24)).view_as(images))  # of normal ones
    start = images + eps * radius.view(-1, 1, 1, 1) ** (1 / values) * direction
    return start if cut is None else _project_l2(start, images, eps)


def _length(x: Tensor) -> Tensor:
    """Euclidean norm ``[B,1,1,1]`` of each image, never zero."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)


def _unit(x: Tensor) -> Tensor:
    return x / _length(x)


def _project_l2(x: Tensor, images: Tensor, eps: Tensor | float) -> Tensor:
    """Into the l2 ball, then into [0,1], which moves each pixel towards the clean one: the image stays in the ball."""
    delta = x - images
    return (images + delta * (eps / _length(delta)).clamp(max=1)).clamp(0, 1)
