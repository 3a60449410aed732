"""Zero-shot predictions on clean images and on those an attack makes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tgazsr_utils.core.attacks import ATTACKS, run_attack
from tgazsr_utils.core.defences import Counted, Defence, Guard
from tgazsr_utils.core.images import Batch, ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import AttackSettings, Protocol

NO_ANSWER = -1  # in place of a class, where logits are not finite


class Predicted(NamedTuple):
    batch: Batch
    attacked: Tensor  # [B,3,H,W]: the images under attack, or the clean ones without
    classes: Tensor  # [B] predicted for them; NO_ANSWER where logits are not finite
    forwards: float = 1.0  # of the image encoder, an image, to predict them
    backwards: float = 0.0


def predictor(
    clip: Clip,
    data: ImageSet,
    attack: AttackSettings | None,
    protocol: Protocol = "last",
    seed: int = 0,
    source: Clip | None = None,
    defence: Defence | None = None,
    aware: bool = True,
) -> Callable[[Batch], Predicted]:
    """What tells the zero-shot classes of a batch of ``data`` on ``clip``'s device, under ``attack`` against ``clip``
    if there is one; or against another model, ``source``, whose images ``clip`` then reads (transfer).

    An image's random start depends on the set, ``seed`` and its row alone, not on its batch (but see
    ``Attack.batch``). Classes are read in full precision whatever the attack computes in; so is, under "worst", which
    image is fooled. With a ``defence`` classes are those of the images behind it; an ``aware`` attack goes through it.
    """
    reader, text = clip.without_autocast(), clip.encode_text(data.prompts)
    attacker, its_text = (clip, text) if source is None else (source, source.encode_text(data.prompts))
    attacker = attacker if protocol_of(attack, protocol) == "last" else attacker.without_autocast()

    @torch.no_grad()
    def predicted(batch: Batch) -> Predicted:
        attacked, rows, known = batch.images, batch.rows.to(clip.device, non_blocking=True), None
        if attack is not None:
            if defence is not None and aware:
                draws = Noise.named(rows, "defence as an attack draws it", data.key, seed)
                known = Guard(defence, attacker.without_autocast(), its_text, draws, max(1, defence.draws))
            noise = Noise.named(rows, "evaluation", data.key, seed)
            attacked = run_attack(attacker, batch.images, batch.labels, its_text, attack, protocol, noise, known)
        if defence is None:
            return Predicted(batch, attacked, classes_of(reader.logits(attacked, text)))
        counted = Counted.of(reader)
        draws = Noise.named(rows, "defence", data.key, seed)
        classes = classes_of(Guard(defence, counted, text, draws).logits(attacked, text))
        return Predicted(batch, attacked, classes, counted.forwards / len(rows), counted.backwards / len(rows))

    return predicted


def predict(
    clip: Clip,
    data: ImageSet,
    attack: AttackSettings | None = None,
    protocol: Protocol = "last",
    seed: int = 0,
    batch: int = 128,
) -> Tensor:
    """Classes ``[N]`` of all images of a set, ``batch`` at once; NO_ANSWER where one cannot be read."""
    classes = torch.full((len(data),), NO_ANSWER)
    for part in map(predictor(clip, data, attack, protocol, seed), data.batches(batch, clip.device)):
        classes[part.batch.rows] = part.classes.cpu()
    return classes


def classes_of(logits: Tensor) -> Tensor:
    """Classes ``[B]`` of logits ``[B,C]``; NO_ANSWER where one is not finite: argmax would take the NaN's class."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NO_ANSWER)


def protocol_of(attack: AttackSettings | None, wanted: Protocol) -> Protocol:
    """What an accuracy is read at: clean images know no iterates, and some attacks keep the first image that fools."""
    if attack is None:
        return "last"
    return "worst" if ATTACKS[attack.attack].keeps_first else wanted
