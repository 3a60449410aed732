"""Can what withstands an attack be called robust? Checks of the attack, once a model.

A model may withstand gradient attacks only because its gradients are of no use (Athalye et al. 2018; Carlini et al.
2019), which other attacks then do without. Such robustness is reported, not counted (``Bench.measure``).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from tgazsr_utils.core.attacks import ATTACKS, pgd, run_attack, summed_cross_entropy
from tgazsr_utils.core.evaluation import classes_of
from tgazsr_utils.core.images import Batch, ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import Noise, digest
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.measuring.autoattack import square
from tgazsr_utils.measuring.measure import batch_that_fits
from tgazsr_utils.measuring.records import AttackCheck, Outcome
from tgazsr_utils.progress import progress
from tgazsr_utils.runtime.fingerprints import code_version, data_key, fingerprint
from tgazsr_utils.runtime.plugins import source_of

CONFIDENCE, P = 0.999, 0.005  # a finding is beyond chance: each model is looked at in many ways; sound ones are to pass
FROM_A_SET = 8  # images, before another set is taken
STEPS = (1, 10, 100)  # of PGD
PASSES = 200  # of an image, about, of all attacks of a check
LARGE_EPS, LARGE_STEPS = (16.0, 64.0), 20  # 1/255; hardly an image should stay recognised
LARGE = tuple(f"PGD-{LARGE_STEPS}, {name}" for name in ("large", "larger"))
FEW = 0.05  # that share may stay so, may have no gradient, and may be where PGD does not raise the loss over noise
QUERIES = 100  # of Square, for each image
# the attack that robust accuracy is measured with, unless that is one of AutoAttack's, which choose their own steps
MEASURED = "as measured"
WEAK = 0.25  # that part at least of what PGD raises the loss by over noise, the attack that is measured must reach


def sets_to_check(sets: Sequence[ImageSet], images: int) -> list[ImageSet]:
    """About ``images`` images: FROM_A_SET from each of as many sets as that makes, the first set among them.

    Not of sets with a single class, where no attack can succeed.
    """
    sets = [data for data in sets if len(data.prompts) > 1]
    count = min(len(sets), max(1, images // FROM_A_SET))
    return [sets[i * len(sets) // count].subset(-(-images // count)) for i in range(count)]


def check_key(clip: Clip, sets: Sequence[ImageSet], attack: AttackSettings) -> str:
    data = [data_key(part) for part in sets]
    attacked_with = [attack.model_dump(), source_of(ATTACKS[attack.attack])]
    return digest(fingerprint(clip), clip.numerics, data, *attacked_with, code_version(__name__))


def check_attack(clip: Clip, sets: Sequence[ImageSet], attack: AttackSettings) -> AttackCheck:
    """Attacks all images of ``sets`` with noise, PGD, Square and ``attack``; ``problems``: what does not fit together.

    All have its epsilon and norm. PGD has steps of a quarter of epsilon, on cross-entropy, from the same noise
    whatever their number. Raises ValueError if none of the images can be read.
    """
    started = time.perf_counter()
    with progress(total=sum(map(len, sets)), desc="check of the attack", unit="image", leave=False) as bar:
        batches = [batch for data in sets for batch in _attacked(clip, data, attack, bar)]
    if not batches:
        raise ValueError(f"no image to check the attack with can be read, of {', '.join(data.key for data in sets)}")
    right, loss = (pd.concat([batch[i] for batch in batches], ignore_index=True) for i in (0, 1))
    zero = sum(batch[2] for batch in batches)
    eps = dict.fromkeys(right, attack.test_eps) | {"clean": 0.0} | dict(zip(LARGE, large_eps(attack)))
    outcomes = []
    for name in loss:
        mean = float(loss[name].mean())
        known = mean if math.isfinite(mean) else None
        outcomes.append(Outcome(attack=name, eps_255=eps[name], correct=right[name].sum(), loss=known))
    return AttackCheck(
        key=check_key(clip, sets, attack),
        model=fingerprint(clip),
        precision=clip.numerics.precision,
        world=sets[0].world,
        datasets=[data.key for data in sets],
        settings=attack.model_dump(),
        n=len(right),
        zero_gradients=zero,
        outcomes=outcomes,
        problems=list(problems(right, loss, zero, large_eps(attack))),
        code=code_version(__name__),
        device=clip.numerics.device,
        seconds=round(time.perf_counter() - started, 3),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def large_eps(attack: AttackSettings) -> tuple[float, ...]:
    """In 1/255: LARGE_EPS, or twice the attack's own where that is more; for l2, LARGE_EPS times the attack's own."""
    if attack.norm == "l2":
        return tuple(large * attack.test_eps for large in LARGE_EPS)
    return tuple(min(255.0, max(large, 2 * attack.test_eps)) for large in LARGE_EPS)


def problems(right: pd.DataFrame, loss: pd.DataFrame, zero: int, large: Sequence[float]) -> Iterator[str]:
    """What speaks against the attack, beyond chance (``CONFIDENCE``, ``P``).

    ``right`` and ``loss``: a row an image, a column an attack: "clean", "noise", "PGD-n" by rising n, "Square", LARGE,
    perhaps MEASURED. ``zero``: images without a gradient. ``large``: epsilons of LARGE, in 1/255. A model tuned at a
    large epsilon may truly withstand the first of them, but not the second.
    """
    n, by_steps = len(right), [name for name in right if name.startswith("PGD-") and name not in LARGE]
    last = by_steps[-1]
    more_than_few = lambda count: _surely(int(count), n) > FEW
    if more_than_few(zero):
        yield f"the gradient is zero for {zero} of {n} images"
    raised = int((loss[last] > loss.noise).sum())
    if more_than_few(n - raised):
        means = f"{loss[last].mean():.2f} against {loss.noise.mean():.2f} on average"
        yield f"{last} raises the loss of {raised} of {n} images over random noise ({means})"
    if MEASURED in right and _chance_of_falling(loss[MEASURED] - loss.noise - WEAK * (loss[last] - loss.noise)) < P:
        means = f"{loss[MEASURED].mean():.2f} against {loss.noise.mean():.2f}"
        does = f"{last} does ({loss[last].mean():.2f}): give it more or larger steps"
        yield f"the attack itself hardly raises the loss over random noise ({means}), and {does}"
    for fewer, more in pairwise(["noise", *by_steps]):
        if _chance_of_falling(loss[more] - loss[fewer]) < P:
            yield f"{more} reaches a lower loss than {fewer} ({loss[more].mean():.2f} against {loss[fewer].mean():.2f})"
    for weak, strong in [*pairwise(by_steps), ("Square", last)]:
        only_weak, only_strong = int((right[strong] & ~right[weak]).sum()), int((right[weak] & ~right[strong]).sum())
        if only_weak and scipy.stats.binomtest(only_weak, only_weak + only_strong, alternative="greater").pvalue < P:
            fewer = f"{strong} {only_strong} that {weak} does not"
            yield f"{weak} fools {only_weak} of {n} images that {strong} does not, and {fewer}"
    left = [int(right[name].sum()) for name in LARGE]
    if all(map(more_than_few, left)):
        larger = f"{left[1]} at {large[1]:g}/255"
        yield f"{left[0]} of {n} images are still recognised at epsilon {large[0]:g}/255, and {larger}"


def _surely(count: int, n: int) -> float:
    """The share that ``count`` of ``n`` is at least, beyond chance (Wilson)."""
    return scipy.stats.binomtest(count, n).proportion_ci(CONFIDENCE, "wilson").low


def _chance_of_falling(rise: pd.Series) -> float:
    """That the mean is so far below zero, if in truth it is not (one-sided t test); NaN for one value, or all zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(scipy.stats.t.cdf(rise.mean() / (rise.std() / np.sqrt(len(rise))), len(rise) - 1))


@torch.no_grad()  # but for the gradients of the pixels
def _attacked(
    clip: Clip, data: ImageSet, attack: AttackSettings, bar: Any
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame, int]]:
    """Of each batch: which images are right and their cross-entropy, a column an attack; how many lack a gradient."""
    reader, text = clip.without_autocast(), clip.encode_text(data.prompts)
    for batch in data.batches(batch_that_fits(clip), clip.device):
        images = {}
        for name, made in _attacks(clip, data.key, batch, text, attack).items():
            bar.set_postfix(set=data.key, attack=name)
            images[name] = made()
        logits = {name: reader.logits(pixels, text) for name, pixels in images.items()}
        right = {name: (classes_of(values) == batch.labels).cpu().numpy() for name, values in logits.items()}
        cross_entropy = partial(F.cross_entropy, target=batch.labels, reduction="none")
        loss = {name: cross_entropy(values).cpu().numpy() for name, values in logits.items()}
        with torch.enable_grad():
            pixels = images["noise"].requires_grad_(True)
            (slope,) = torch.autograd.grad(summed_cross_entropy(clip.logits(pixels, text), batch.labels), pixels)
        length = slope.flatten(1).abs().amax(1)
        bar.update(len(batch.labels))
        yield pd.DataFrame(right), pd.DataFrame(loss), int(((length == 0) | ~length.isfinite()).sum())


def _attacks(
    clip: Clip, key: str, batch: Batch, text: Tensor, attack: AttackSettings
) -> dict[str, Callable[[], Tensor]]:
    """What makes the batch's images under each attack of a check, by name."""
    x, y, eps = batch.images, batch.labels, attack.test_eps / 255
    noise = Noise.named(batch.rows.to(clip.device), "sanity", key)
    run = lambda eps, steps: partial(pgd, clip, x, y, text, eps, eps / 4, steps, norm=attack.norm, generator=noise)
    made: dict[str, Callable[[], Tensor]] = {"clean": lambda: x, "noise": run(eps, 0)}
    if not ATTACKS[attack.attack].keeps_first:
        made[MEASURED] = partial(run_attack, clip, x, y, text, attack, "last", noise)
    made |= {f"PGD-{steps}": run(eps, steps) for steps in STEPS}
    reader = clip.without_autocast()
    made["Square"] = partial(square, reader, x, y, text, eps, None, QUERIES, norm=attack.norm, generator=noise)
    return made | {name: run(large / 255, LARGE_STEPS) for name, large in zip(LARGE, large_eps(attack))}


def table(found: Mapping[tuple[str, int], AttackCheck]) -> pd.DataFrame:
    """One row a method and seed: accuracy in percent under each attack of its check, and the verdict."""
    rows = []
    for (method, seed), check in found.items():
        row = {outcome.attack: 100 * outcome.correct / check.n for outcome in check.outcomes}
        row |= {"images": check.n, "verdict": "; ".join(check.problems) or "passed"}
        rows.append({"method": method, "seed": seed} | row)
    return pd.DataFrame(rows).set_index(["method", "seed"]) if rows else pd.DataFrame()
