"""AutoAttack and its Square attack, through pyautoattack: all that is known here of that library's inside."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tgazsr_utils.core.attacks import ATTACKS, Attack, Generator, ball, check_arguments
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import Norm, Protocol

BATCH = 64  # images at once, always of the same rows
NORMS = {"linf": "Linf", "l2": "L2"}  # their names there


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

    ``version`` "apgd", as published for this method: APGD-CE, then APGD-DLR on what withstood it (with two classes
    APGD-CE alone, since DLR needs three), each of ``steps`` iterations from one random start; "standard": the authors'
    full ensemble APGD-CE, targeted APGD-DLR, targeted FAB and Square (5000 queries), each with as many target classes
    as there are, at most 9. It chooses its own step sizes and keeps the first image that fools: ``step_size`` and
    ``protocol`` are not used. Raises ValueError for bad pixels, ``eps`` or ``steps``, and for "standard" with fewer
    than four classes.
    """
    check_arguments(images, norm, eps=eps, steps=steps)
    classes = len(text)
    if not len(images):
        return images
    if version == "standard" and classes < 4:
        raise ValueError(f"AutoAttack's standard version needs at least 4 classes (targeted DLR); there are {classes}")
    if isinstance(generator, Noise):
        seed = int(2**24 * generator.uniform(1)[0])
    else:
        seed = int(
            torch.randint(2**31, (), generator=generator, device=None if generator is None else generator.device)
        )
    options = {"norm": NORMS[norm], "eps": eps, "seed": seed, "device": images.device}
    attack = _configured(lambda pixels: clip.logits(pixels, text), version, classes, steps, options)
    attack.logger.setLevel("ERROR")  # its warnings repeat for each batch, and one is wrong for three classes
    tracer = sys.gettrace()
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):  # it seeds the global generator
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    sys.settrace(tracer)  # and switches tracing off, debuggers' too
    return torch.clamp(adversarial, *ball(images, eps)) if norm == "linf" else adversarial.clamp(0, 1)


def _configured(
    logits: Callable[[Tensor], Tensor], version: str, classes: int, steps: int, options: dict[str, Any]
) -> Any:
    """pyautoattack's AutoAttack of a version, with no more targets than there are, and ``steps`` for APGD."""
    from pyautoattack import AutoAttack  # slow to import, and rarely needed

    if version == "standard":
        attack = AutoAttack(logits, version="standard", **options)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    elif version == "apgd":
        losses = ["apgd-ce"] if classes < 3 else ["apgd-ce", "apgd-dlr"]
        attack = AutoAttack(logits, version="custom", attacks=losses, **options)
        attack.apgd = type(attack.apgd)(logits, n_iter=steps, n_restarts=1, logger=attack.logger, **options)
    else:
        raise ValueError(f"AutoAttack version {version!r} is unknown; choose 'apgd' or 'standard'")
    return attack


ATTACKS["autoattack"] = Attack(autoattack, keeps_first=True, batch=BATCH)


def square(
    clip: Clip, images: Tensor, labels: Tensor, text: Tensor, eps: float, queries: int, norm: Norm = "linf"
) -> Tensor:
    """The Square attack (Andriushchenko et al. 2020) by pyautoattack: random search that sees logits only.

    On images whose class leads; it knows neither ties nor logits that are not numbers.
    """
    from pyautoattack.square import SquareAttack  # slow to import

    logits = lambda pixels: clip.logits(pixels, text).nan_to_num()
    options = {"norm": NORMS[norm], "eps": eps, "seed": 0, "device": images.device}
    attack = SquareAttack(logits, n_queries=queries, **options)
    leads = attack.margin_and_loss(images, labels)[0] > 0
    adversarial = images.clone()
    if leads.any():
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):  # it seeds the global generator
            adversarial[leads] = attack.perturb(images[leads], labels[leads])
    return adversarial
