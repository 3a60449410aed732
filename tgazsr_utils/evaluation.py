"""Zero-shot accuracy, clean and under attack, as Records with counts and intervals."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from . import distributed
from .attacks import attack_as_set, generators
from .attention import Variant, attention_shift, text_guided_attention
from .datasets import Batch, ImageSet
from .files import DamagedFile, code_version, digest, load_tensors, save_tensors, seeded
from .models import Clip
from .settings import AttackSettings, Protocol, Settings

MODULES = ("models", "attacks", "distributed", "evaluation", "datasets", "layouts", "miniworld")  # the source a record depends on
MOST = {True: 1024, False: 128}  # images attacked at once, on CUDA and elsewhere
ACTIVATIONS = 32  # numbers that the image encoder keeps for each token, channel and block, when its input is differentiated
TOGETHER = 64  # images that AutoAttack has at once
NO_ANSWER, UNREADABLE, NOT_YET = -1, -2, -3  # in place of a predicted class
SAVE_EVERY = 20.0  # seconds of work that a killed evaluation may lose


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion, in [0,1]; z = 1.96 for 95 %."""
    if n == 0:
        return 0.0, 1.0
    p, factor = correct / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / factor
    half = z / factor * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the bounds are exact; rounding must not leave them just inside.
    return 0.0 if correct == 0 else middle - half, 1.0 if correct == n else middle + half


def batch_that_fits(clip: Clip) -> int:
    """How many images to attack at once: a power of two whose activations should take a third of the free memory, at most MOST."""
    visual, device = clip.visual, clip.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    tokens = 1 + clip.grid[0] * clip.grid[1]
    one = 4 * ACTIVATIONS * tokens * visual.conv1.out_channels * len(visual.transformer.resblocks)
    return 2 ** int(math.log2(max(1, min(MOST[device.type == "cuda"], free / 3 / one))))


def attacked_batches(
    clip: Clip, data: ImageSet, attack: AttackSettings | None, protocol: Protocol = "last", seed: int = 0,
    chunks: int | Sequence[Tensor] | None = None,
) -> Iterator[tuple[Batch, Tensor]]:  # fmt: skip
    """Batches of clean images and the attacked ones (the same without attack), of all rows or of those of ``chunks``.

    An image's random start depends on the set, ``seed`` and its row alone, not on its batch (but for AutoAttack). Attacks that
    stop at the first image that fools decide that in full precision.
    """
    attacker = clip if protocol_of(attack, protocol) == "last" else clip.in_full_precision()
    text = clip.encode_text(data.prompts)
    for batch in data.batches(chunks or batch_that_fits(clip), clip.device):
        attacked = batch.images
        if attack is not None:
            starts = generators(clip.device, batch.rows.tolist(), "evaluation", data.key, seed)
            attacked = attack_as_set(attacker, batch.images, batch.labels, text, attack, protocol, starts)
        yield batch, attacked


def pixel_sums(images: Tensor) -> Tensor:
    """A number ``[B]`` for each of images ``[B,3,H,W]`` in [0,1] that changes with any of its 8-bit pixels; on the CPU."""
    levels = (255 * images).round().long().flatten(1)
    odd = 2 * torch.randint(2**62, levels.shape[1:], generator=seeded("cpu", "pixel sums")) + 1
    return (levels * odd.to(levels.device)).sum(1).cpu()  # modulo 2^64


def answers(logits: Tensor) -> Tensor:
    """Classes ``[B]`` of logits ``[B,C]``; NO_ANSWER where one is not finite, as argmax would take class 0 or the NaN's."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NO_ANSWER)


def predict(
    clip: Clip,
    data: ImageSet,
    attack: AttackSettings | None,
    protocol: Protocol = "last",
    seed: int = 0,
    bar=None,
    partial: Path | None = None,
) -> Tensor:
    """Predicted classes ``[N]`` on clean images (``attack=None``) or on those the attack makes against ``clip``.

    NO_ANSWER where logits are not finite, which is said; UNREADABLE where an image could not be read. Read in full
    precision whatever the attack computes in. ``partial`` names a file that keeps what is done every few seconds; if it is
    there, this goes on from it, with the same outcome. Where memory runs out the batch is halved. Several processes
    (``distributed``) share the images. AutoAttack, whose random draws are for a batch, always has TOGETHER images of the
    same rows at once.
    """
    return _predict(clip, data, attack, protocol, seed, bar, partial)[0]


@torch.no_grad()
def _predict(
    clip: Clip, data: ImageSet, attack: AttackSettings | None, protocol: Protocol, seed: int, bar, partial: Path | None
) -> tuple[Tensor, Tensor]:
    """(classes of ``predict``, ``pixel_sums`` of the images that were read)."""
    reader, text = clip.in_full_precision(), clip.encode_text(data.prompts)
    predictions, sums = (distributed.largest(kept, clip.device) for kept in _kept(partial, len(data)))
    left = predictions == NOT_YET
    together = attack is not None and attack.attack == "autoattack"
    chunks = [rows for rows in torch.arange(len(data)).split(TOGETHER) if left[rows].any()] if together else left.nonzero()
    own = chunks[distributed.rank() :: distributed.processes()]
    if bar is not None:
        bar.update(int((~left).sum()))
    size, saved = TOGETHER if together else batch_that_fits(clip), time.monotonic()
    while len(own):
        try:
            batches = own if together else own.flatten().split(size)
            for batch, attacked in attacked_batches(clip, data, attack, protocol, seed, batches):
                predictions[batch.rows] = answers(reader.logits(attacked, text)).cpu()
                sums[batch.rows] = pixel_sums(batch.images)
                if bar is not None:
                    bar.update(len(batch.rows) * distributed.processes())
                if partial is not None and time.monotonic() - saved > SAVE_EVERY:
                    save_tensors(_of_process(partial), {"predictions": predictions, "sums": sums}, run=partial.stem)
                    saved = time.monotonic()
            break
        except RuntimeError as error:
            if together or size == 1 or not should_reduce_batch_size(error):
                raise
            size //= 2
            own = own[predictions[own.flatten()] == NOT_YET]
        clear_device_cache()  # outside of the handler, which holds on to what filled the memory
        print(f"memory ran out; going on with {size} images at once", flush=True)
    for rows in own:
        predictions[rows] = predictions[rows].clamp(min=UNREADABLE)
    predictions, sums = (distributed.largest(part, clip.device) for part in (predictions, sums))
    if (predictions == NOT_YET).any():
        raise RuntimeError(f"{int((predictions == NOT_YET).sum())} images of {data.key} were measured by no process")
    without = int((predictions == NO_ANSWER).sum())
    if without and distributed.rank() == 0:
        print(f"logits are not finite for {without} of {len(data)} images of {data.key}, which count as not recognised", flush=True)
    return predictions, sums


def _of_process(partial: Path) -> Path:
    return partial.with_stem(f"{partial.stem}_{distributed.rank()}")


def _kept(partial: Path | None, n: int) -> tuple[Tensor, Tensor]:
    """Predictions and pixel sums that earlier runs have left in ``partial``, by however many processes; NOT_YET elsewhere."""
    predictions, sums = torch.full((n,), NOT_YET), torch.full((n,), torch.iinfo(torch.int64).min)
    for path in sorted(partial.parent.glob(f"{partial.stem}_*{partial.suffix}")) if partial else ():
        try:
            kept = load_tensors(path, run=partial.stem)[0]
            predictions, sums = torch.maximum(predictions, kept["predictions"]), torch.maximum(sums, kept["sums"])
        except DamagedFile as error:
            print(f"{error}; what it held is measured anew", flush=True)
        except FileNotFoundError:  # another process has finished this measurement
            pass
    return predictions, sums


@dataclass(frozen=True)
class AttentionUnderAttack:
    """What an attack did to each image of a set: pixels and maps on the CPU, and a row of measures an image."""

    images: Tensor  # [N,3,H,W]
    adversarial: Tensor  # [N,3,H,W]
    clean_maps: Tensor  # [N,h,w], guided by the true class
    attacked_maps: Tensor  # [N,h,w]
    frame: pd.DataFrame  # attention_shift's columns, label, predictions, clean_correct, flipped


@torch.no_grad()
def attention_under_attack(
    clip: Clip, data: ImageSet, attack: AttackSettings, variant: Variant = "reference", seed: int = 0
) -> AttentionUnderAttack:
    """Attacks every image and measures how far the attention guided by its true class moves (``attention_shift``).

    ``flipped``: right when clean, wrong when attacked.
    """
    text = clip.encode_text(data.prompts)
    parts = []
    for batch, attacked in attacked_batches(clip, data, attack, seed=seed):
        tokens = clip.encode_image(batch.images), clip.encode_image(attacked)
        maps = [text_guided_attention(t, text[batch.labels], variant, grid=clip.grid) for t in tokens]
        guesses = [clip.similarity(t.pooled, text).argmax(1) for t in tokens]
        parts.append([t.cpu() for t in (batch.rows, batch.images, attacked, *maps, *guesses)])
    rows, images, attacked, clean_maps, attacked_maps, clean_guess, attacked_guess = map(torch.cat, zip(*parts))
    frame = attention_shift(clean_maps, attacked_maps, None if data.masks is None else data.masks[rows])
    frame["label"], frame["clean_prediction"] = data.labels[rows].numpy(), clean_guess.numpy()
    frame["attacked_prediction"] = attacked_guess.numpy()
    frame["clean_correct"] = frame.clean_prediction == frame.label
    frame["flipped"] = frame.clean_correct & (frame.attacked_prediction != frame.label)
    return AttentionUnderAttack(images, attacked, clean_maps, attacked_maps, frame)


class Record(Settings):
    """One measurement: a method's model on one set under one attack. Counts, not only rates; never edited."""

    key: str  # names all that the outcome depends on
    method: str
    model: str  # fingerprint of the weights
    precision: str = "fp32"  # that attacks compute in
    arch: str
    world: str
    dataset: str
    data: str  # fingerprint of the images (of files: their names and sizes), labels and prompts
    pixels: str | None = None  # names the pixels that were read: a file whose content changes under its name shows
    attack: str  # "none" or AttackSettings.label
    eps_255: float
    protocol: Protocol
    seed: int
    n: int
    available: int | None = None  # images in the whole part of the set, if not all were used
    left_out: int = 0  # images that could not be read
    published: bool = False  # the set is as published: number of images and classes, preprocessing, prompts
    correct: int
    hits: str  # one bit an image, packed, as hex: what paired comparisons need
    settings: dict[str, Any]  # of the attack
    training: dict[str, Any] = {}  # what made the weights, where it is known: method, settings, data, code
    code: str
    device: str
    seconds: float
    time: str  # UTC, ISO 8601

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.n


def record_key(
    clip: Clip, data: ImageSet, attack: AttackSettings | None, protocol: Protocol, method: str, seed: int
) -> str:
    settings = {} if attack is None else attack.model_dump()
    protocol = protocol_of(attack, protocol)
    return digest(
        method, clip.fingerprint(), clip.how, data.fingerprint(), settings, protocol, seed, code_version(MODULES)
    )


def protocol_of(attack: AttackSettings | None, wanted: Protocol) -> Protocol:
    """What an accuracy is read at: clean images know no iterates, and AutoAttack keeps the first image that fools."""
    if attack is None:
        return "last"
    return "worst" if attack.attack == "autoattack" else wanted


def evaluate(
    clip: Clip,
    data: ImageSet,
    attack: AttackSettings | None,
    protocol: Protocol = "last",
    *,
    method: str,
    seed: int = 0,
    bar=None,
    partial: Path | None = None,
) -> Record:
    """Top-1 zero-shot accuracy of ``clip`` on one set; ``attack=None`` for clean images.

    ``protocol`` "last": accuracy at the attack's last iterate, as published; "worst": on images that withstand every
    iterate (see ``attacks.pgd``), the stricter one. ``bar`` is updated by images; ``partial``: see ``predict``. Images
    that cannot be read are not counted.
    """
    started = time.perf_counter()
    predictions, sums = _predict(clip, data, attack, protocol, seed, bar, partial)
    read = predictions != UNREADABLE
    if not read.any():
        raise ValueError(f"image set {data.key!r}: none of its {len(data)} images can be read")
    hits = (predictions == data.labels)[read].numpy()
    return Record(
        key=record_key(clip, data, attack, protocol, method, seed),
        method=method,
        model=clip.fingerprint(),
        precision=clip.precision,
        arch=clip.arch,
        world=data.world,
        dataset=data.key,
        data=data.fingerprint(),
        pixels=digest(sums[read]),
        attack="none" if attack is None else attack.label,
        eps_255=0.0 if attack is None else attack.test_eps,
        protocol=protocol_of(attack, protocol),
        seed=seed,
        n=len(hits),
        available=data.available,
        left_out=data.left_out + len(data) - len(hits),
        published=data.published,
        correct=int(hits.sum()),
        hits=np.packbits(hits).tobytes().hex(),
        settings={} if attack is None else attack.model_dump(),
        training=clip.training,
        code=code_version(MODULES),
        device=clip.target,
        seconds=round(time.perf_counter() - started, 3),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
