"""Zero-shot accuracy, clean and under attack, as Records with counts and intervals."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .attacks import attack_as_set
from .attention import Variant, attention_shift, text_guided_attention
from .datasets import Batch, ImageSet
from .files import code_version, digest, write_atomic
from .models import Clip
from .settings import AttackSettings, Protocol, Settings

MODULES = ("models", "attacks", "evaluation", "datasets", "miniworld")  # the source a record depends on
BATCH = 128  # images attacked at once; the attack's random start is drawn for each batch
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


def attacked_batches(
    clip: Clip, data: ImageSet, attack: AttackSettings | None, protocol: Protocol = "last", seed: int = 0, skip: int = 0
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of clean images, without the first ``skip`` of them, and the attacked images (the same without attack)."""
    text = clip.encode_text(data.prompts)
    for batch in data.batches(BATCH, clip.device, skip):
        attacked = batch.images
        if attack is not None:
            stream = digest("evaluation", data.key, seed, batch.number * BATCH)
            generator = torch.Generator().manual_seed(int(stream, 16))
            attacked = attack_as_set(clip, batch.images, batch.labels, text, attack, protocol, generator)
        yield batch, attacked


@torch.no_grad()
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

    -1 where an image could not be read. ``partial`` names a file that keeps what is done every few seconds; if it is
    there, this goes on from it, with the same outcome.
    """
    text = clip.encode_text(data.prompts)
    predictions, done, saved = torch.full((len(data),), -1), 0, time.monotonic()
    if partial is not None and partial.exists():
        try:
            state = load_file(partial)
            predictions, done = state["predictions"], int(state["batches"])
        except (SafetensorError, OSError, KeyError) as error:
            print(f"{partial} is damaged ({error}); starting this set anew", flush=True)
    if bar is not None:
        bar.update(min(done * BATCH, len(data)))
    for batch, attacked in attacked_batches(clip, data, attack, protocol, seed, skip=done):
        predictions[batch.rows] = clip.logits(attacked, text).argmax(1).cpu()
        if bar is not None:
            bar.update(len(batch.rows))
        if partial is not None and time.monotonic() - saved > SAVE_EVERY:
            state = {"predictions": predictions, "batches": torch.tensor(batch.number + 1)}
            write_atomic(partial, lambda temporary: save_file(state, temporary))
            saved = time.monotonic()
    return predictions


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
    arch: str
    world: str
    dataset: str
    data: str  # fingerprint of the images, labels and prompts
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
        method, clip.fingerprint(), data.fingerprint(), settings, protocol, seed, str(clip.device), code_version(MODULES)
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
    predictions = predict(clip, data, attack, protocol, seed, bar, partial)
    read = predictions >= 0
    if not read.any():
        raise ValueError(f"image set {data.key!r}: none of its {len(data)} images can be read")
    hits = (predictions == data.labels)[read].numpy()
    return Record(
        key=record_key(clip, data, attack, protocol, method, seed),
        method=method,
        model=clip.fingerprint(),
        arch=clip.arch,
        world=data.world,
        dataset=data.key,
        data=data.fingerprint(),
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
        code=code_version(MODULES),
        device=str(clip.device),
        seconds=round(time.perf_counter() - started, 3),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
