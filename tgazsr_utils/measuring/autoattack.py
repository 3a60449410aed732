"""AutoAttack, whole and in parts, through pyautoattack: all that is known here of that library's inside."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tgazsr_utils.core.attacks import ATTACKS, Attack, Generator, ball, check_arguments
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import Norm, Protocol
from tgazsr_utils.progress import progress
from tgazsr_utils.runtime import processes

BATCH = 64  # images at once, always of the same rows
NORMS = {"linf": "Linf", "l2": "L2"}  # their names there
VERSIONS = {  # by exact name, the parts of each, each on what withstood those before
    "apgd-ce": ("apgd-ce",),
    "apgd": ("apgd-ce", "apgd-dlr"),
    "apgd-t": ("apgd-ce", "apgd-t"),
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
}
CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # that a part needs at least: the DLR loss compares so many logits
STEPS, QUERIES, TARGETS = 100, 5000, 9  # of the standard version; TARGETS of any, at most
PATIENCE = 20.0  # seconds, after which it is shown how often the model was asked: one batch may take many minutes


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
    generator: Generator = None,
) -> Tensor:
    """AutoAttack (Croce & Hein 2020) by pyautoattack: adversarial images ``[B,3,H,W]``, the clean one where none fools.

    ``version`` "apgd-ce": APGD on cross-entropy; "apgd", as published for this method: then on the DLR loss; "apgd-t":
    then on the targeted DLR loss instead; each of ``steps`` iterations from one random start. "standard": the authors'
    full ensemble with their own numbers, "apgd-t", then targeted FAB and Square (5000 queries). Targets are as many
    classes as there are besides, at most nine. What needs more classes than there are is left out: with two classes
    all but "standard" are "apgd-ce". It chooses its own step sizes and keeps the first image that fools: ``step_size``
    and ``protocol`` are not used. Raises ValueError for bad pixels, ``eps``, ``steps`` or ``version``.
    """
    check_arguments(images, norm, eps=eps, steps=steps)
    if version not in VERSIONS:
        raise ValueError(f"AutoAttack version {version!r} is unknown; choose of {', '.join(VERSIONS)}")
    if not len(images):
        return images
    options = {"norm": NORMS[norm], "eps": eps, "seed": _seed(generator), "device": images.device}
    tracer = sys.gettrace()
    with _own_generators(images), _counted(clip, text, version) as logits:
        attack = _configured(logits, version, len(text), steps, options)
        attack.logger.setLevel("ERROR")  # its warnings repeat for each batch, and one is wrong for three classes
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    sys.settrace(tracer)  # and switches tracing off, debuggers' too
    return torch.clamp(adversarial, *ball(images, eps)) if norm == "linf" else adversarial.clamp(0, 1)


def _own_generators(images: Tensor) -> Any:
    """Where the library may seed the global generators."""
    return torch.random.fork_rng(devices=[images.device] if images.is_cuda else [])


@contextmanager
def _counted(clip: Clip, text: Tensor, name: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """The logits of images; shown after a while is how often they were asked for."""
    shown = {"disable": not processes.is_main(), "delay": PATIENCE, "leave": False}
    with progress(desc=name, bar_format="{desc}: {n_fmt} passes [{elapsed}]", **shown) as bar:

        def logits(pixels: Tensor) -> Tensor:
            bar.update()
            return clip.logits(pixels, text)

        yield logits


def _configured(
    logits: Callable[[Tensor], Tensor], version: str, classes: int, steps: int, options: dict[str, Any]
) -> Any:
    """pyautoattack's AutoAttack of a version, with no more targets than there are, and ``steps`` for APGD."""
    from pyautoattack import AutoAttack  # slow to import, and rarely needed

    parts = [part for part in VERSIONS[version] if classes >= CLASSES.get(part, 2)]
    attack = AutoAttack(logits, version="custom", attacks=parts, **options)
    options, steps = options | {"n_restarts": 1, "logger": attack.logger}, STEPS if version == "standard" else steps
    attack.apgd = type(attack.apgd)(logits, n_iter=steps, **options)
    attack.apgd_targeted = type(attack.apgd_targeted)(logits, n_iter=steps, **options)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(TARGETS, classes - 1)
    return attack


def _seed(generator: Generator) -> int:
    if isinstance(generator, Noise):
        return int(2**24 * generator.uniform(1)[0])
    return int(torch.randint(2**31, (), generator=generator, device=None if generator is None else generator.device))


def square(
    clip: Clip,
    images: Tensor,
    labels: Tensor,
    text: Tensor,
    eps: float,
    step_size: float | None = None,
    steps: int = QUERIES,
    *,
    norm: Norm = "linf",
    protocol: Protocol = "worst",
    generator: Generator = None,
) -> Tensor:
    """The Square attack (Andriushchenko et al. 2020) by pyautoattack: random search that sees logits only.

    ``steps`` queries for each image whose class leads; it knows neither ties nor logits that are not numbers. It gives
    the clean image where none fools: ``step_size`` and ``protocol`` are not used.
    """
    from pyautoattack.square import SquareAttack  # slow to import

    check_arguments(images, norm, eps=eps, steps=steps)
    if not len(images):
        return images
    options = {"norm": NORMS[norm], "eps": eps, "seed": _seed(generator), "device": images.device}
    adversarial = images.clone()
    with _own_generators(images), _counted(clip, text, "square") as logits:
        attack = SquareAttack(lambda pixels: logits(pixels).nan_to_num(), n_queries=steps, **options)
        leads = attack.margin_and_loss(images, labels)[0] > 0
        if leads.any():
            adversarial[leads] = attack.perturb(images[leads], labels[leads])
    return adversarial


ATTACKS |= {name: Attack(partial(autoattack, version=name), True, BATCH) for name in VERSIONS}
ATTACKS["square"] = Attack(square, True, BATCH)
