"""Image sets: the mini-world's rendered tasks, the published sets, and class folders of your own photographs.

``python -m tgazsr_utils.datasets`` lists, checks and fetches the published sets.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.libraries import torchvision
from tgazsr_utils.datasets import miniworld
from tgazsr_utils.datasets.class_folders import Box, Source, Split
from tgazsr_utils.datasets.layouts import class_names, existing_root, list_datasets, open_source
from tgazsr_utils.datasets.published_sets import DATASETS, DEFAULT_PROMPT, Preprocess
from tgazsr_utils.machine import allowed_cpus
from tgazsr_utils.progress import progress

OnBadImage = Literal["stop", "leave_out"]
CPU = torch.device("cpu")
KEEP_DECODED = 2**28  # bytes: a set up to this size is decoded once, a larger one anew each time it is read
KEEP_RESIDENT = 2**31  # bytes: a set to tune on is kept up to this size, on CUDA up to an eighth of the device's memory
CHUNKS_AHEAD = 2  # decoded while another one is worked on


class Decoded(NamedTuple):
    image: Tensor  # [3,S,S] uint8
    mask: Tensor | None  # [S,S] bool


@dataclass(frozen=True, eq=False)
class Files:
    """Reads images from files, or from what else a layout keeps them in.

    By threads, since Pillow and numpy work without Python's lock: as fast as worker processes, which would need shared
    memory for their images and signals of their own.
    """

    source: Source
    chosen: Tensor  # [N] indices into the source
    side: int | None  # None: as the files are
    preprocess: Preprocess
    on_bad_image: OnBadImage = "stop"
    unreadable: list[str] = field(default_factory=list)  # what was left out so far, a line an image

    def read(self, chunks: Sequence[Tensor], device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``core.images.ImageReader``."""
        for rows, decoded in self.decode(chunks):
            images = [one.image for one in decoded] or [torch.empty(3, self.side or 0, self.side or 0).byte()]
            joined = torch.stack(images)[: len(rows)]
            yield rows, joined.pin_memory() if device.type == "cuda" else joined

    def pick(self, rows: Tensor) -> "Files":
        return replace(self, chosen=self.chosen[rows])

    def decode(self, chunks: Sequence[Tensor], masks: bool = False) -> Iterator[tuple[Tensor, list[Decoded]]]:
        """(rows that could be read, what was read) of each chunk; ``masks``: with those of its boxes, if it has any.

        At most ``1 + CHUNKS_AHEAD`` chunks are in memory; no thread outlives this, however it ends.
        Raises ValueError for an unreadable image, unless these are left out.
        """
        torchvision()  # here, as threads that import it at once get in each other's way
        pool = ThreadPoolExecutor(min(16, allowed_cpus()), thread_name_prefix="decode")
        ask = lambda chunk: [(row, pool.submit(self._decode, row, masks)) for row in chunk.tolist()]
        later = iter(chunks)
        try:
            waiting = deque(ask(chunk) for chunk in islice(later, 1 + CHUNKS_AHEAD))
            while waiting:
                yield self._collect(waiting.popleft())
                waiting.extend(ask(chunk) for chunk in islice(later, 1))
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, row: int, masks: bool) -> Decoded:
        i = int(self.chosen[row])
        image = self.source.open(i)
        fitted = fit(image, self.side, self.preprocess) if self.side else image
        pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1)))
        if not masks or not self.source.boxes:
            return Decoded(pixels, None)
        return Decoded(pixels, _box_mask(self.source.boxes[i], image.size, self.side, self.preprocess))

    def _collect(self, asked: list[tuple[int, Future]]) -> tuple[Tensor, list[Decoded]]:
        rows, decoded = [], []
        for row, future in asked:
            try:
                decoded.append(future.result())
                rows.append(row)
            except Exception as error:  # PIL raises many kinds for a damaged file, h5py and pickle others
                self._cannot_be_read(row, " ".join(str(error).split()) or type(error).__name__)
        return torch.tensor(rows, dtype=torch.long), decoded

    def _cannot_be_read(self, row: int, reason: str) -> None:
        problem = f"image {' '.join(self.source.where[int(self.chosen[row])].split())} cannot be read: {reason}"
        if self.on_bad_image == "stop":
            raise ValueError(f"{problem} (on_bad_image leave_out goes on without it)") from None
        if problem not in self.unreadable:
            self.unreadable.append(problem)
            print(f"left out: {problem}", file=sys.stderr, flush=True)

    def identity(self) -> list[Any]:
        """What tells these images from others without reading them: files by name and size, and how they are read."""
        contents = [self.source.contents[i] for i in self.chosen.tolist()]
        return [contents, [self.side, self.preprocess, self.on_bad_image]]


@dataclass(frozen=True, eq=False)
class KeptAtFileSize:
    """Images in memory at the size of their files, fitted in each batch: as by PIL, within one grey level."""

    images: Tensor  # [N,3,h,w] uint8
    files: Files

    def read(self, chunks: Sequence[Tensor], device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``core.images.ImageReader``."""
        for rows in chunks:
            yield rows, fit(self.images[rows.to(self.images.device)], self.files.side, self.files.preprocess)

    def pick(self, rows: Tensor) -> "KeptAtFileSize":
        return KeptAtFileSize(self.images[rows.to(self.images.device)], self.files.pick(rows))

    def identity(self) -> list[Any]:
        return self.files.identity()


def resident(data: ImageSet, device: torch.device) -> ImageSet:
    """The same set with its images in the memory of ``device``, if they fit there (``KEEP_RESIDENT``); else as it is.

    Images that are read as needed are kept at the size of their files, where all have one smaller than what is asked.
    """
    limit = torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else KEEP_RESIDENT
    if isinstance(data.images, Tensor):
        return replace(data, images=data.images.to(device)) if data.images.numel() <= limit else data
    whole = replace(data.images, side=None)
    shape = next(whole.read([torch.arange(len(data))[:1]]))[1].shape[1:]
    if not 0 < shape[1:].numel() < data.images.side**2 or len(data) * shape.numel() > limit:
        return data
    images, kept = torch.empty(len(data), *shape, dtype=torch.uint8), 0
    for rows, read in _decode_in_order(data, whole):
        if any(one.image.shape != shape for one in read):
            return data
        for row, one in zip(rows, read):
            images[row] = one.image
        kept += len(rows)
    return data if kept < len(data) else replace(data, images=KeptAtFileSize(images.to(device), data.images))


def decoded(data: ImageSet) -> ImageSet:
    """The same set with all images in memory that can be read. Raises ValueError if there is none."""
    if isinstance(data.images, Tensor):
        return data
    rows, images, masks = [], [], []
    for part, read in _decode_in_order(data, data.images, masks=True):
        rows.append(part)
        images += [one.image for one in read]
        masks += [one.mask for one in read if one.mask is not None]
    if not images:
        raise ValueError(f"image set {data.key!r}: none of its {len(data)} images can be read")
    kept = torch.cat(rows)
    boxes = torch.stack(masks) if masks else None
    lacking = len(data) - len(kept)
    return replace(data, images=torch.stack(images), labels=data.labels[kept], masks=boxes, left_out=lacking)


def _decode_in_order(data: ImageSet, files: Files, masks: bool = False) -> Iterator[tuple[Tensor, list[Decoded]]]:
    """All images in order, with a bar."""
    with progress(total=len(data), desc=f"read {data.key}", leave=False, unit="image") as bar:
        for rows, read in files.decode(torch.arange(len(data)).split(64), masks):
            yield rows, read
            bar.update(len(rows))


def choose_datasets(
    wanted: list[str] | Literal["published"] | None, root: str | Path | None, test_fraction: float | None = None
) -> list[str]:
    """The test sets to use: those named; all there are (None); or those of the 16 published that are there.

    Unless named, a set without readable lists of test images is left out, and a line says why.
    """
    if isinstance(wanted, list) or root is None and wanted is None:
        return wanted or list_datasets(root)
    there = []
    for key in list_datasets(root) if root is not None else ():
        if wanted is None or key in DATASETS:
            try:
                open_source(key, "test", existing_root(root), test_fraction)
                there.append(key)
            except ValueError as error:
                print(f"left out: {error}")
    missing = [key for key in DATASETS if key not in there]
    if not there:
        raise ValueError(f"data_root {str(root)!r} has no image set to use; see python -m tgazsr_utils.datasets list")
    if missing and wanted == "published":
        print(f"{len(there)} of {len(DATASETS)} published sets are there; missing: {', '.join(missing)}")
    return there


def load_dataset(
    key: str,
    split: Split,
    root: str | Path | None = None,
    n: int | None = None,
    image_size: int = miniworld.SIDE,
    seed: int = 0,
    *,
    preprocess: Preprocess | None = None,
    prompt: str | None = None,
    test_fraction: float | None = None,
    on_bad_image: OnBadImage = "stop",
    world: str | None = None,
    decode: bool = True,
) -> ImageSet:
    """The images of one set, at ``image_size`` x ``image_size``.

    ``root=None``: the mini-world, ``key`` a task, ``n`` images (default 1000) rendered anew for each ``seed``. Else
    ``key`` is one of ``DATASETS``, in its published layout below ``root``, or any folder ``<root>/<key>`` in
    Tiny-ImageNet's layout, with ``train`` and ``test`` (or ``val``) folders of ``<class>/*``, or with just
    ``<class>/*``, perhaps one level further down. A set without a split of its own is split for each class by ``seed``,
    ``test_fraction`` of it for testing; None: a fifth, but all of a published set. ``n`` caps the number of images,
    evenly over classes.
    ``preprocess`` and ``prompt`` replace the set's own: "resize" both sides, or "crop" (resize the shorter side to
    256/224 of ``image_size``, centre-crop); bilinear, by PIL. ``on_bad_image``: what an unreadable file does.
    ``world`` replaces what the numbers are said to be about. Sets of more than 256 MiB, and any with ``decode`` False,
    are read as they are needed.
    Raises ValueError for an unknown key, a missing folder, or an unreadable image unless that is to be left out.
    """
    if root is None:
        for name, value in (("preprocess", preprocess), ("test_fraction", test_fraction)):
            if value is not None:
                raise ValueError(f"{name} = {value!r} is for image files; the mini-world (data_root None) has none")
        return _load_miniworld(key, split, 1000 if n is None else n, image_size, seed, world, prompt)
    source, spec = open_source(key, split, existing_root(root), test_fraction, seed), DATASETS.get(key)
    own = spec.preprocess if spec else "crop"
    files = Files(source, torch.arange(len(source.labels)), image_size, preprocess or own, on_bad_image)
    data = _labelled(key, split, files, prompt, world or "photographs").subset(n, seed)
    return decoded(data) if decode and len(data) * 3 * image_size**2 <= KEEP_DECODED else data


def class_prompts(
    key: str, split: Split, root: str | Path | None, prompt: str | None = None, test_fraction: float | None = None
) -> tuple[str, ...]:
    """What ``load_dataset`` will ask for, a prompt a class; no image is read. Raises ValueError as it does."""
    if root is None:
        return _miniworld_prompts(key, prompt)
    return _named(key, open_source(key, split, existing_root(root), test_fraction), prompt)[1]


def _named(key: str, source: Source, prompt: str | None) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Names and prompts of a set's classes, and the template of these."""
    spec = DATASETS.get(key)
    names, as_published = class_names(source, spec)
    template = prompt or (spec.prompt if spec else DEFAULT_PROMPT)
    asked = names if spec and template != spec.prompt else as_published
    return names, tuple(template.replace("{}", name) for name in asked), template


def _labelled(key: str, split: Split, files: Files, prompt: str | None, world: str) -> ImageSet:
    """All images of one part with their labels and prompts."""
    spec, source = DATASETS.get(key), files.source
    names, prompts, template = _named(key, source, prompt)
    told = [f"left out: {problem}" for problem in source.left_out]
    if same := sorted({prompt for prompt in prompts if prompts.count(prompt) > 1}):
        told.append(f"classes that cannot be told apart, as they have one prompt: {'; '.join(same)}")
    for problem in told:
        print(f"{key}: {problem}", file=sys.stderr, flush=True)
    found = len(source.labels), len(names), files.preprocess, template
    published = bool(spec) and split == "test" and found == (spec.images, spec.classes, spec.preprocess, spec.prompt)
    labels = torch.tensor(source.labels)
    return ImageSet(key, world, files, labels, names, prompts, mask_kind="box", published=published)


def _load_miniworld(
    key: str, split: Split, n: int, image_size: int, seed: int, world: str | None, prompt: str | None
) -> ImageSet:
    prompts, task = _miniworld_prompts(key, prompt), miniworld.TASKS[key]
    images, labels, masks = miniworld.task_images(key, n, split, seed)
    if image_size != miniworld.SIDE:
        images, masks = fit(images, image_size, "resize"), fit(masks, image_size, "resize", "nearest")
    return ImageSet(key, world or "mini-world", images, labels, task.class_names, prompts, masks)


def _miniworld_prompts(key: str, prompt: str | None) -> tuple[str, ...]:
    if key not in miniworld.TASKS:
        raise ValueError(f"mini-world task {key!r} is unknown; there are: {', '.join(miniworld.TASKS)}")
    task = miniworld.TASKS[key]
    return tuple((prompt or task.prompt).replace("{}", name) for name in task.class_names)


def _box_mask(box: Box, size: tuple[int, int], side: int, preprocess: Preprocess) -> Tensor:
    mask = Image.new("L", size)
    mask.paste(255, (box[0], box[1], box[2] + 1, box[3] + 1))
    return torch.from_numpy(np.array(fit(mask, side, preprocess, "nearest"))) > 127


Pixels = TypeVar("Pixels", Image.Image, Tensor)


def fit(image: Pixels, side: int, preprocess: Preprocess, mode: Literal["bilinear", "nearest"] = "bilinear") -> Pixels:
    """An image, or images ``[...,H,W]``, at ``side`` x ``side``: "resize" both sides, or "crop" the centre.

    Before that crop the shorter side is brought to 256/224 of ``side``.
    """
    transforms = torchvision().transforms
    interpolation = transforms.InterpolationMode(mode)
    if preprocess == "resize":
        return transforms.functional.resize(image, [side, side], interpolation)
    resized = transforms.functional.resize(image, round(side * 256 / 224), interpolation)
    return transforms.functional.center_crop(resized, [side, side])
