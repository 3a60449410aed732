"""Zero-shot accuracy, clean and under attack, as Records; measured in jobs of some images that resume."""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from tgazsr_utils.core.attacks import ATTACKS, check_guarded, pgd
from tgazsr_utils.core.defences import Defence, find_defence
from tgazsr_utils.core.evaluation import NO_ANSWER, Predicted, predictor, protocol_of
from tgazsr_utils.core.images import Batch, ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import digest, seeded
from tgazsr_utils.core.settings import AttackSettings, Protocol
from tgazsr_utils.machine import allowed_memory
from tgazsr_utils.measuring import autoattack  # noqa: F401  (adds itself to ATTACKS)
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.runtime.files import DamagedFile, load_tensors, save_tensors
from tgazsr_utils.runtime.fingerprints import code_version, data_key, fingerprint
from tgazsr_utils.runtime.plugins import source_of

LARGEST_BATCH = {"cuda": 1024, "cpu": 128}  # images attacked at once
PART = {"cuda": 0.7, "cpu": 0.25}  # of all memory, for their activations
FREE_PART = 0.5  # of what is free on a CPU, where nothing tells when it runs out
# Numbers that the image encoder keeps for each token, channel and block, when its input is differentiated, on a CPU.
ACTIVATIONS = 32
SLICE = 4096  # images of one job; a multiple of any ``Attack.batch``
SAVE_EVERY = 20.0  # seconds of work that a killed measurement may lose
NOT_YET, READ, UNREADABLE = 0, 1, 2  # states of an image


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one record is of: a model on one set, on clean images (``attack`` None) or under an attack.

    Perhaps behind a defence, of which the attack knows if it is ``aware``.
    """

    clip: Clip
    data: ImageSet
    attack: AttackSettings | None
    protocol: Protocol = "last"
    method: str = "CLIP"
    seed: int = 0
    source: Clip | None = None  # that the attack is against, if that is another model
    defence: Defence | None = None
    aware: bool = False

    def __post_init__(self) -> None:
        if self.defence is not None and self.attack is not None:
            check_guarded(self.attack.attack)

    @cached_property
    def key(self) -> str:
        """Names all that the outcome depends on."""
        parts = [self.settings, self.read_at, self.seed, code_version(__name__)]
        parts += [self.attack and source_of(ATTACKS[self.attack.attack])]
        if (one := self.defence) is not None:  # perhaps defined in a notebook's cell, or a plugin
            source = source_of(one) or inspect.getsource(one.run)
            parts += [one.name, source, one.differentiable, one.draws, self.aware]
        return digest(self.method, fingerprint(self.clip), self.clip.numerics, data_key(self.data), *parts)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the attack, and the fingerprint of its source."""
        source = {} if self.source is None else {"source": fingerprint(self.source)}
        return {} if self.attack is None else self.attack.model_dump() | source

    @property
    def label(self) -> str:
        """Such as "none", "pgd-10" and, of an attack on another model, "transfer-pgd-10"."""
        return "none" if self.attack is None else ("transfer-" if self.source else "") + self.attack.label

    @property
    def read_at(self) -> Protocol:
        """Iterates that fool the source are nothing to go by."""
        return protocol_of(self.attack, "last" if self.source else self.protocol)

    @property
    def slices(self) -> list[range]:
        """The rows of its jobs."""
        n = len(self.data)
        return [range(start, min(start + SLICE, n)) for start in range(0, n, SLICE)]

    @property
    def fixed_batch(self) -> int | None:
        return None if self.attack is None else ATTACKS[self.attack.attack].batch

    def predictor(self) -> Callable[[Batch], Predicted]:
        return predictor(
            self.clip, self.data, self.attack, self.read_at, self.seed, self.source, self.defence, self.aware
        )


class Answers(NamedTuple):
    """Of some rows of a set, one entry an image."""

    classes: Tensor  # int64, predicted; NO_ANSWER where logits are not finite
    states: Tensor  # uint8: NOT_YET, READ or UNREADABLE
    sums: Tensor  # int64, ``pixel_sums``
    at_once: Tensor  # int64, images of a batch then
    forwards: Tensor  # passes of the image encoder to answer, the batch's mean
    backwards: Tensor

    @classmethod
    def none(cls, n: int) -> "Answers":
        zeros = torch.zeros(n, dtype=torch.int64)
        passes = torch.zeros(2, n).unbind()
        states = torch.full((n,), NOT_YET, dtype=torch.uint8)
        return cls(zeros + NO_ANSWER, states, zeros.clone(), zeros.clone(), *passes)


def answer(
    ms: Sequence[Measurement], rows: range, kept: Sequence[Path] = (), bar: Any = None
) -> list[tuple[Answers, float]]:
    """What each of ``ms`` says of these rows, and the seconds it took; all are of one model and one set.

    An image is read once for all of them. ``kept`` names a file for each that holds what is done every few seconds; if
    it is there, this goes on from it, with the same outcome. Where memory runs out the batch is halved.
    """
    parts = [_Part(m, rows, path) for m, path in zip(ms, kept or [None] * len(ms))]
    fixed = max(m.fixed_batch or 0 for m in ms)
    size = fixed or batch_that_fits(ms[0].clip)
    if bar is not None:
        bar.update(sum(int((~part.left).sum()) for part in parts))
    while any(part.left.any() for part in parts):
        try:
            _answer_all(parts, rows, size, bool(fixed), bar)
        except RuntimeError as error:
            from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size  # slow to import

            memory = should_reduce_batch_size(error) or "CUDA error: out of memory" in str(error)
            if fixed or size == 1 or not memory:
                raise
            size //= 2
            _fitted[_place_of(ms[0].clip)] = size
            reduced = True
        else:
            reduced = False
        if reduced:  # outside of the handler, which holds on to what filled the memory
            clear_device_cache()
            print(f"memory ran out; going on with {size} images at once", flush=True)
    _keep(parts)
    return [(part.answers, part.seconds) for part in parts]


class _Part:
    """What one measurement says of some rows of its set, so far."""

    def __init__(self, m: Measurement, rows: range, path: Path | None):
        self.m, self.path = m, path
        self.answers, self.seconds = _kept(path, len(rows))

    @property
    def left(self) -> Tensor:
        """Which of the rows it has not answered yet."""
        return self.answers.states == NOT_YET


def _answer_all(parts: Sequence[_Part], rows: range, size: int, fixed: bool, bar: Any) -> None:
    """Answers what is left, an image read once for all ``parts``; those that cannot be read are marked so."""
    data, device = parts[0].m.data, parts[0].m.clip.device
    left = torch.stack([part.left for part in parts]).any(0)
    started = saved = time.monotonic()
    ask = [part.m.predictor() for part in parts]
    try:
        for batch in data.batches(_chunks(left, rows, size, fixed), device):
            places, sums = batch.rows - rows.start, pixel_sums(batch.images)
            for part, predicted in zip(parts, ask):
                if new := int(part.left[places].sum()):
                    _, _, classes, *passes = predicted(batch)
                    for tensor, values in zip(part.answers, (classes.cpu(), READ, sums, size, *passes)):
                        tensor[places] = values
                    part.seconds, started = part.seconds + time.monotonic() - started, time.monotonic()
                    if bar is not None:
                        bar.update(new)
            if time.monotonic() - saved > SAVE_EVERY:
                saved = time.monotonic()
                _keep(parts)
    except Exception:  # one of them fails: what the others have said stands
        _keep(parts)
        raise
    for part in parts:
        part.answers.states[part.left] = UNREADABLE


def _keep(parts: Sequence[_Part]) -> None:
    for part in parts:
        if part.path is not None:
            save_tensors(part.path, part.answers._asdict(), run=part.path.stem, seconds=part.seconds)


def _chunks(left: Tensor, rows: range, size: int, fixed: bool) -> list[Tensor]:
    """Batches of what is still to do, as rows of the set; with a fixed batch always of the same ones."""
    if not fixed:
        return list((left.nonzero().flatten() + rows.start).split(size))
    return [part + rows.start for part in torch.arange(len(rows)).split(size) if left[part].any()]


def _kept(path: Path | None, n: int) -> tuple[Answers, float]:
    """What an earlier run has left; nothing, and it is said, where that is damaged."""
    if path is not None and path.exists():
        try:
            tensors, about = load_tensors(path, run=path.stem)
            return Answers(**tensors), about["seconds"]
        except DamagedFile as error:
            print(f"{error}; what it held is measured anew", flush=True)
        except FileNotFoundError:  # another process has finished this measurement
            pass
    return Answers.none(n), 0.0


def record_of(m: Measurement, parts: Sequence[Answers], seconds: float) -> Record:
    """The record of a measurement from the answers of all its slices. Raises ValueError if no image could be read."""
    classes, states, sums, at_once, *passes = (torch.cat(part) for part in zip(*parts))
    read = states == READ
    if not read.any():
        raise ValueError(f"image set {m.data.key!r}: none of its {len(m.data)} images can be read")
    if without := int((classes[read] == NO_ANSWER).sum()):
        lost = f"{without} of {len(m.data)} images of {m.data.key}"
        print(f"logits are not finite for {lost}, which count as not recognised", flush=True)
    hits = (classes == m.data.labels)[read].numpy()
    return Record(
        key=m.key,
        method=m.method,
        model=fingerprint(m.clip),
        **m.clip.numerics._asdict(),
        arch=m.clip.arch,
        world=m.data.world,
        dataset=m.data.key,
        data=fingerprint(m.data),
        pixels=digest(sums[read]),
        attack=m.label,
        eps_255=0.0 if m.attack is None else m.attack.test_eps,
        protocol=m.read_at,
        seed=m.seed,
        defence=m.defence.name if m.defence else "",
        aware=m.aware,
        **{name: float(part[read].double().mean()) for name, part in zip(("forwards", "backwards"), passes)},
        n=len(hits),
        available=m.data.available,
        left_out=m.data.left_out + len(m.data) - len(hits),
        published=m.data.published,
        correct=int(hits.sum()),
        hits=np.packbits(hits).tobytes().hex(),
        settings=m.settings,
        training=m.clip.training_record,
        code=code_version(__name__),
        batch=int(at_once[read].min()),
        seconds=round(seconds, 3),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def evaluate(
    clip: Clip,
    data: ImageSet,
    attack: AttackSettings | None = None,
    protocol: Protocol = "last",
    *,
    method: str = "CLIP",
    seed: int = 0,
    source: Clip | None = None,
    defence: str | None = None,
    aware: bool = True,
) -> Record:
    """Top-1 zero-shot accuracy of ``clip`` on one set; ``attack=None`` for clean images.

    ``protocol`` "last": accuracy at the attack's last iterate, as published; "worst": on images that withstand every
    iterate (see ``attacks.pgd``), the stricter one. ``source``: on images that the attack makes against this model,
    which must take images of the same size (transfer). Images that cannot be read are not counted.

    ``defence`` names one of ``core.defences``, which the model answers behind; an ``aware`` attack goes through it.
    """
    known = {} if defence is None else {"defence": find_defence(defence), "aware": aware and attack is not None}
    m = Measurement(clip, data, attack, protocol, method, seed, source, **known)
    answers, seconds = zip(*(answer([m], rows)[0] for rows in m.slices))
    return record_of(m, answers, sum(seconds))


def batch_that_fits(clip: Clip) -> int:
    """How many images to attack at once: a power of two whose activations fit into PART of the device's memory.

    So it is the same each time on one machine, but where others have filled its memory: of a CPU FREE_PART of the rest
    is taken, on CUDA what fitted when memory last ran out.
    """
    if clip.device.type == "cuda":
        kind, room = "cuda", PART["cuda"] * torch.cuda.get_device_properties(clip.device).total_memory
    else:
        memory, kind = psutil.virtual_memory(), "cpu"
        room = min(PART["cpu"] * allowed_memory(memory.total), FREE_PART * memory.available)
    most = min(LARGEST_BATCH[kind], room / _bytes_an_image(clip), _fitted.get(_place_of(clip), math.inf))
    return 2 ** int(math.log2(max(1, most)))


_fitted: dict[tuple[Any, ...], int] = {}  # images at once after memory had run out, by ``_place_of`` a model


def _place_of(clip: Clip) -> tuple[Any, ...]:
    return clip.device, clip.arch, clip.image_size, clip.numerics


def _bytes_an_image(clip: Clip) -> float:
    """What attacking one image more takes: on CUDA measured, from the peaks of two small batches."""
    if clip.device.type != "cuda":
        tokens, layers = 1 + clip.grid[0] * clip.grid[1], len(clip.visual.transformer.resblocks)
        return 4 * ACTIVATIONS * tokens * clip.visual.conv1.out_channels * layers
    text, peaks = clip.encode_text(["a"]), []
    for n in (8, 8, 24):  # the first compiles
        images = torch.zeros(n, 3, *clip.image_size, device=clip.device)
        torch.cuda.reset_peak_memory_stats(clip.device)
        pgd(clip, images, torch.zeros(n, dtype=torch.int64, device=clip.device), text, 0.1, 0.1, 1)
        peaks.append(torch.cuda.max_memory_allocated(clip.device))
    return max(1.0, (peaks[2] - peaks[1]) / 16)


def pixel_sums(images: Tensor) -> Tensor:
    """A number ``[B]`` of each of images ``[B,3,H,W]`` in [0,1] that tells any of its 8-bit pixels; on the CPU."""
    levels = (255 * images).round().long().flatten(1)
    odd = 2 * torch.randint(2**62, levels.shape[1:], generator=seeded("cpu", "pixel sums")) + 1
    return (levels * odd.to(levels.device)).sum(1).cpu()  # modulo 2^64
