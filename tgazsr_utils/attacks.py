"""Adversarial images: what a bounded attacker adds to pixels so that zero-shot CLIP fails."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import Clip, ImageTokens

AttackLoss = Callable[[ImageTokens], Tensor]


def pgd(
    clip: Clip,
    images: Tensor,
    labels: Tensor,
    text: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    *,
    loss: AttackLoss | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """l-infinity projected gradient ascent (Madry et al. 2018): adversarial images ``[B,3,H,W]``.

    ``images`` ``[B,3,H,W]`` in [0,1]; ``labels`` ``[B]``; ``text`` ``[C,D]`` unit norm; ``eps`` and ``step_size`` in
    [0,1] pixel units. Starts uniformly in the ball (``generator``, on the CPU, seeds it), then repeats
    ``x' = project(x' + step_size * sign(gradient))`` on the summed cross-entropy, or on ``loss(tokens)`` if given. The
    last iterate is returned: at most ``eps`` from ``images`` and inside [0,1], exactly. Only the pixels' gradient is
    taken. Raises ValueError for pixels outside [0,1] or a negative ``eps``, ``step_size`` or ``steps``.
    """
    for name, value in (("eps", eps), ("step_size", step_size), ("steps", steps)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    if images.numel() and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise ValueError(f"pixels range from {float(images.min()):g} to {float(images.max()):g}; attacks need [0, 1]")
    if loss is None:
        loss = lambda tokens: F.cross_entropy(clip.similarity(tokens.pooled, text), labels, reduction="sum")
    low, high = _ball(images, eps)
    start = torch.rand(images.shape, generator=generator).to(images.device)
    adversarial = torch.clamp(images + eps * (2 * start - 1), low, high)
    for _ in range(steps):
        adversarial.requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(clip.encode_image(adversarial)), adversarial)
        adversarial = torch.clamp(adversarial.detach() + step_size * gradient.sign(), low, high)
    return adversarial.detach()


def _ball(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tightest representable pixel bounds of the eps-ball cut with [0,1]: rounding must not let a pixel out by an ulp."""
    low, high = (images.double() - eps).clamp(0, 1), (images.double() + eps).clamp(0, 1)
    inner_low, inner_high = low.to(images.dtype), high.to(images.dtype)
    inner_low = torch.where(inner_low.double() < low, torch.nextafter(inner_low, images), inner_low)
    inner_high = torch.where(inner_high.double() > high, torch.nextafter(inner_high, images), inner_high)
    return inner_low, inner_high
