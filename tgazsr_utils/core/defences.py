"""Defences at test time: what is done to an image before the model answers, and how an attack goes through that.

A defence is a function ``(clip, images, text) -> images``, of images ``[B,3,H,W]`` in [0,1] and unit-norm text
``[C,D]``. To add one, write such a function and decorate it with ``@defence(name)``. It is measured twice: under an
attack that does not know of it, and under one that does, which alone says whether it holds.
"""

import copy
import difflib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.images import ball
from tgazsr_utils.core.models import Clip, ImageTokens
from tgazsr_utils.core.seeds import Noise, digest


@dataclass(frozen=True)
class Defence:
    name: str
    run: Callable[..., Tensor]
    differentiable: bool = False
    draws: int = 0


DEFENCES: dict[str, Defence] = {}


def defence(name: str, *, differentiable: bool = False, draws: int = 0) -> Callable:
    """Registers a function ``(clip, images, text) -> images`` under its name.

    An attack that knows of it takes its gradient if it is ``differentiable``. If not, it takes the loss's gradient at
    the defended image as that of the image itself (straight-through, BPDA of Athalye et al. 2018), in a mean with that
    of the undefended image, which still leads where confidence behind the defence has made the other vanish. ``draws``
    says that it is random, with a fourth argument ``noise`` (see ``seeds.Noise``), and over how many draws such an
    attack takes the mean at each step (EOT, ibid.).
    """

    def register(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        DEFENCES[name] = Defence(name, run, differentiable, draws)
        return run

    return register


def find_defence(name: str) -> Defence:
    """The defence of a name. Raises ValueError, with the names there are, for an unknown one."""
    if name not in DEFENCES:
        by_lower = {known.lower(): known for known in DEFENCES}
        close = difflib.get_close_matches(name.lower(), by_lower, n=1)
        hint = f"did you mean {by_lower[close[0]]}? " if close else ""
        raise ValueError(f"defence {name!r} is unknown: {hint}there are: {', '.join(DEFENCES)}")
    return DEFENCES[name]


class Counted(Clip):
    """A model that counts the images it encodes, and those whose encoding is differentiated."""

    forwards: int
    backwards: int

    @classmethod
    def of(cls, clip: Clip) -> "Counted":
        """The same model, sharing its weights."""
        same: Any = copy.copy(clip)
        same.__class__ = cls
        same.forwards = same.backwards = 0
        return same

    def encode_image(self, pixels: Tensor) -> ImageTokens:
        tokens = super().encode_image(pixels)
        self.forwards += len(pixels)
        if tokens.pooled.requires_grad:
            tokens.pooled.register_hook(self._count_backward)
        return tokens

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass(frozen=True)
class Guard:
    """A defence before a model, for one batch; the random numbers of each call are other ones."""

    defence: Defence
    clip: Clip
    text: Tensor
    noise: Noise
    number: int = 1  # of draws that ``logits`` are a mean over
    calls: Iterator[int] = field(default_factory=itertools.count)

    def of(self, rows: Tensor) -> "Guard":
        """For these images of the batch alone."""
        return replace(self, noise=self.noise._replace(rows=self.noise.rows[rows]))

    def __call__(self, images: Tensor) -> Tensor:
        """What the model sees in place of ``images``, with the gradient that an attack takes."""
        noise = self.noise._replace(seed=int(digest(self.noise.seed, next(self.calls)), 16))
        draw = (noise,) if self.defence.draws else ()
        if self.defence.differentiable:
            return self.defence.run(self.clip, images, self.text, *draw)
        with torch.no_grad():
            changed = self.defence.run(self.clip, images.detach(), self.text, *draw)
        return changed + (images - images.detach())

    def draws(self, images: Tensor) -> Iterator[Tensor]:
        """What an attack takes gradients of: so many draws and, where it goes straight through, the images."""
        yield from (self(images) for _ in range(self.number))
        if not self.defence.differentiable:
            yield images

    def logits(self, images: Tensor, text: Tensor) -> Tensor:
        """As ``Clip.logits``."""
        return torch.stack([self.clip.logits(self(images), text) for _ in range(self.number)]).mean(0)


def _embedded(clip: Clip, pixels: Tensor) -> Tensor:
    """f(x): class embeddings ``[B,D]``, not normalised."""
    return clip.encode_image(pixels).pooled.to(pixels.dtype)


def _value_and_gradient(value: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """``value`` ``[B]`` of images, and its gradient."""
    with torch.enable_grad():
        pixels = images.detach().requires_grad_(True)
        values = value(pixels)
        (gradient,) = torch.autograd.grad(values.sum(), pixels)
    return values.detach(), gradient


@defence("TTC", draws=4)
def ttc(clip: Clip, images: Tensor, text: Tensor, noise: Noise) -> Tensor:
    """Test-time counterattack (Xing et al., CVPR 2025): an image that noise hardly moves is suspect, and moved away.

        d_0 ~ U(-4/255, 4/255) cut to [0,1],   d_(i+1) = project(d_i + 1/255 sign(gradient of |f(x + d_i) - f(x)|^2))
        x + d_0                                 where |f(x + d_0) - f(x)| / |f(x)| > 0.2
        x + sum_i w_i d_i,  w_i ~ exp(2 i)      elsewhere, i = 0, 1, 2; all in the 4/255 ball

    Known to an attack: straight-through, over four starts.
    """
    origin = _embedded(clip, images)
    away = lambda pixels: (_embedded(clip, pixels) - origin).square().sum(1)
    low, high = ball(images, 4 / 255)
    drawn = noise.uniform(*images.shape[1:]).to(images)
    points = [torch.clamp(images + 4 / 255 * (2 * drawn - 1), low, high)]
    moved, gradient = _value_and_gradient(away, points[0])
    points.append(torch.clamp(points[0] + gradient.sign() / 255, low, high))
    points.append(torch.clamp(points[1] + _value_and_gradient(away, points[1])[1].sign() / 255, low, high))
    weights = torch.arange(3.0).mul(2).softmax(0).tolist()
    countered = images + sum(weight * (point - images) for weight, point in zip(weights, points))
    stirred = moved.sqrt() / torch.linalg.vector_norm(origin, dim=1) > 0.2
    return torch.where(stirred[:, None, None, None], points[0], torch.clamp(countered, low, high))


@defence("low-pass", differentiable=True)
def low_pass(clip: Clip, images: Tensor, text: Tensor) -> Tensor:
    """L x: frequencies times ``exp(-|k|^2 / (2 r^2))``, radius r = 40 at 224 pixels a side, in proportion at others.

    The baseline that an independent check found as good as the others. Known to an attack: by its own gradient, that
    of a linear map.
    """
    height, width = images.shape[-2:]
    options = {"device": images.device, "dtype": images.dtype}
    down, across = torch.fft.fftfreq(height, **options), torch.fft.rfftfreq(width, **options)  # k / side
    gaussian = torch.exp(-(down[:, None].square() + across.square()) / (2 * (40 / 224) ** 2))
    smooth = torch.fft.irfft2(torch.fft.rfft2(images) * gaussian, s=(height, width))
    return smooth + (smooth.clamp(0, 1) - smooth).detach()  # rounding leaves [0,1]; no gradient is lost to that


@defence("CSR")
def csr(clip: Clip, images: Tensor, text: Tensor) -> Tensor:
    """CSR (ICML 2026): an image that a low-pass filter L moves is suspect, and moved towards what that makes of it.

        where cos(f(x), f(L x)) < 0.85:   x'_0 = x,   x'_(i+1) = project(x'_i + 2/255 sign(gradient of J(x'_i)))
        J(x') = cos(f(x'), f(L x)) - cos(f(x'), f(x))

    Three steps in the 4/255 ball; the x'_i of the highest J, start included. Known to an attack: straight-through.
    """
    unit = lambda pixels: F.normalize(_embedded(clip, pixels), dim=1)
    own, smooth = unit(images), unit(low_pass(clip, images, text))
    suspect = ((own * smooth).sum(1) < 0.85).nonzero().flatten()
    if not len(suspect):
        return images
    towards = (smooth - own)[suspect]
    objective = lambda pixels: (unit(pixels) * towards).sum(1)
    bounds = ball(images[suspect], 4 / 255)
    points, values = [images[suspect]], []
    for _ in range(3):
        value, gradient = _value_and_gradient(objective, points[-1])
        values.append(value)
        points.append(torch.clamp(points[-1] + 2 / 255 * gradient.sign(), *bounds))
    best = torch.stack([*values, objective(points[-1])]).argmax(0)
    return images.index_copy(0, suspect, torch.stack(points)[best, torch.arange(len(best))])


@defence("ET3")
def et3(clip: Clip, images: Tensor, text: Tensor) -> Tensor:
    """ET3 (CVPR 2026): down the energy ``E(x) = -logsumexp(100 cos(f(x), t))`` over the classes' prompts t.

        x <- project(x - 2.5 g / |g|_2),   g = gradient of E

    Twice, in the 5/255 ball; 2.5 is a length at any size of images. Known to an attack: straight-through, as there is
    no second derivative of fused attention.
    """
    cosines = lambda pixels: F.normalize(_embedded(clip, pixels), dim=1) @ text.to(pixels.dtype).T
    energy = lambda pixels: -(100 * cosines(pixels)).logsumexp(1)
    bounds, moved = ball(images, 5 / 255), images
    for _ in range(2):
        gradient = _value_and_gradient(energy, moved)[1]
        moved = torch.clamp(moved - 2.5 * F.normalize(gradient.flatten(1), dim=1).view_as(gradient), *bounds)
    return moved


@defence("Anti-Adversary")
def anti_adversary(clip: Clip, images: Tensor, text: Tensor) -> Tensor:
    """Anti-adversary layer (Alfarra et al., AAAI 2022): up the confidence of the class that is predicted anyway.

        x <- project(x + 2/255 sign(gradient of log p(y | x))),   y = argmax_c p(c | f(x)) of the image as it came

    Twice, in the 4/255 ball: the size of TTC's, not the paper's own. Known to an attack: straight-through.
    """
    predicted = clip.logits(images, text).argmax(1)
    confidence = lambda pixels: -F.cross_entropy(clip.logits(pixels, text), predicted, reduction="none")
    bounds, moved = ball(images, 4 / 255), images
    for _ in range(2):
        moved = torch.clamp(moved + 2 / 255 * _value_and_gradient(confidence, moved)[1].sign(), *bounds)
    return moved
