"""Image sets: the mini-world's rendered tasks, the published sets, and class folders of your own photographs.

``python -m tgazsr_utils.datasets`` lists, checks and fetches the published sets.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF

from . import miniworld
from .files import digest
from .layouts import Box, Source, Split, existing_root, list_datasets, open_source
from .progress import progress
from .published_sets import DATASETS, DEFAULT_PROMPT, Preprocess, clean_name

OnBadImage = Literal["stop", "leave_out"]
KEEP_DECODED = 2**28  # bytes: a set up to this size is decoded once, a larger one anew each time it is read
KEEP_RESIDENT = 2**31  # bytes: a set that is tuned on is kept at the size of its files up to this size; on CUDA up to an eighth of its memory


class Decoded(NamedTuple):
    rows: list[int]  # those that could be read
    images: Tensor  # [len(rows),3,S,S] uint8
    masks: Tensor | None  # [len(rows),S,S] bool
    problems: list[str]


@dataclass(frozen=True, eq=False)
class Undecoded(Dataset):
    """Images decoded when asked for: ``[list of rows] -> Decoded``."""

    source: Source
    chosen: Tensor  # [N] indices into the source
    side: int | None  # None: as the files are
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, rows: list[int]) -> Decoded:
        kept, images, masks, problems = [], [], [], []
        for row in rows:
            i = int(self.chosen[row])
            try:
                image = self.source.open(i).convert("RGB")
            except Exception as error:  # PIL raises many kinds for a damaged file, h5py and pickle others
                reason = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"image {' '.join(self.source.where[i].split())} cannot be read: {reason}")
                continue
            pixels = _to_tensor(fit(image, self.side, self.preprocess) if self.side else image)
            if images and pixels.shape != images[0].shape:
                continue  # only of files as they are; their set then has no one size
            kept.append(row)
            images.append(pixels)
            if self.source.boxes and self.side:
                masks.append(_box_mask(self.source.boxes[i], image.size, self.side, self.preprocess))
        pixels = torch.stack(images) if images else torch.empty(0, 3, self.side or 0, self.side or 0, dtype=torch.uint8)
        return Decoded(kept, pixels, torch.stack(masks) if masks else None, problems)


class Batch(NamedTuple):
    number: int  # of the chunk it was read from
    rows: Tensor  # [B], those that could be read
    images: Tensor  # [B,3,H,W] float in [0,1], on the device
    labels: Tensor  # [B], on the device


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size, with the prompts of their classes."""

    key: str
    world: str  # "mini-world", "photographs" or settings.PLUMBING: results of different worlds are never mixed
    images: Tensor | Undecoded  # [N,3,H,W] uint8, or the means to read them
    labels: Tensor  # [N] int64
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    masks: Tensor | None = None  # [N,H,W] bool: where the object is; only of sets kept decoded
    mask_kind: str = "mask"  # "mask": its exact outline; "box": its bounding box
    available: int | None = None  # images in the whole part, if this is a cut of it
    published: bool = False  # as published: number of images and classes of the whole part, preprocessing, prompts
    left_out: int = 0  # images that are not among these since they cannot be read
    on_bad_image: OnBadImage = "stop"
    unreadable: list[str] = field(default_factory=list)  # what was left out so far, a line an image
    to_fit: tuple[int, Preprocess] | None = None  # side and way, for images that are kept at the size of their files

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, chunks: int | Sequence[Tensor], device: torch.device | str = "cpu", skip: int = 0
    ) -> Iterator[Batch]:
        """Batches of this size in order, or of these rows; without the first ``skip`` of them.

        An image that cannot be read stops this with a ValueError that names it, or, with ``on_bad_image``
        "leave_out", is missing from its batch and listed in ``unreadable``.
        """
        if isinstance(chunks, int):
            chunks = torch.arange(len(self)).split(chunks)
        chunks = chunks[skip:]
        if isinstance(self.images, Tensor):
            parts = ((rows, self._fitted(rows), None) for rows in chunks)
        else:
            parts = self._decode([chunk.tolist() for chunk in chunks], pin=torch.device(device).type == "cuda")
        for number, (rows, images, _) in enumerate(parts, start=skip):
            if len(rows):
                moved = images.to(device, non_blocking=images.is_pinned()).float() / 255
                yield Batch(number, rows, moved, self.labels[rows].to(device))

    def _fitted(self, rows: Tensor) -> Tensor:
        images = self.images[rows.to(self.images.device)]
        return fit(images, *self.to_fit) if self.to_fit else images

    def resident(self, device: torch.device) -> "ImageSet":
        """The same set with its images in the memory of ``device``, if they fit there (``KEEP_RESIDENT``); else this one.

        Images that are read as needed are kept at the size of their files, where all have one smaller than what is asked
        for, and fitted in each batch: equal to what PIL makes of them within one grey level.
        """
        limit = torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else KEEP_RESIDENT
        if isinstance(self.images, Tensor):
            small = self.images.numel() <= limit
            return replace(self, images=self.images.to(device)) if small else self
        undecoded = replace(self.images, side=None)
        shape = undecoded[[0]].images.shape[1:] if len(self) else (3, 0, 0)
        if not 0 < shape[1] * shape[2] < self.images.side**2 or len(self) * shape.numel() > limit:
            return self
        images, chunks = torch.empty(len(self), *shape, dtype=torch.uint8), torch.arange(len(self)).split(64)
        with progress(total=len(self), desc=f"read {self.key}", leave=False, unit="image") as bar:
            for chunk, (rows, pixels, _) in zip(chunks, replace(self, images=undecoded)._decode([c.tolist() for c in chunks])):
                if pixels.shape[1:] != shape or len(rows) < len(chunk):
                    return self
                images[rows] = pixels
                bar.update(len(rows))
        return replace(self, images=images.to(device), to_fit=(self.images.side, self.images.preprocess))

    def _decode(self, chunks: Sequence[list[int]], pin: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(rows, images, masks) of each chunk, without those that cannot be read; ``pin``: for a quick way to a CUDA device."""
        workers = min(16, os.cpu_count() or 1, len(chunks)) if sum(map(len, chunks)) >= 512 else 0
        # The generator keeps the loader from drawing its workers' seed from the global random state.
        options = {"num_workers": workers, "pin_memory": pin, "generator": torch.Generator().manual_seed(0)}
        options["worker_init_fn"] = _leave_interrupts_to_the_main_process
        for decoded in DataLoader(self.images, batch_size=None, sampler=chunks, **options):
            if decoded.problems and self.on_bad_image == "stop":
                raise ValueError(f"{decoded.problems[0]} (on_bad_image leave_out goes on without it)")
            for problem in decoded.problems:
                if problem not in self.unreadable:
                    self.unreadable.append(problem)
                    print(f"left out: {problem}", file=sys.stderr, flush=True)
            yield torch.tensor(decoded.rows, dtype=torch.long), decoded.images, decoded.masks

    def decoded(self) -> "ImageSet":
        """The same set with all its images in memory, without those that cannot be read."""
        if isinstance(self.images, Tensor):
            return self
        parts = []
        with progress(total=len(self), desc=f"read {self.key}", leave=False, unit="image") as bar:
            for part in self._decode([chunk.tolist() for chunk in torch.arange(len(self)).split(64)]):
                parts.append(part)
                bar.update(len(part[0]))
        rows, images, masks = zip(*parts)
        kept = torch.cat(rows)
        if not len(kept):
            raise ValueError(f"image set {self.key!r}: none of its {len(self)} images can be read")
        joined = torch.cat([part for part in masks if part is not None]) if self.images.source.boxes else None
        bad = len(self) - len(kept)
        return replace(self, images=torch.cat(images), labels=self.labels[kept], masks=joined, left_out=bad)

    def subset(self, n: int | None, seed: int = 0) -> "ImageSet":
        """At most ``n`` images, drawn by ``seed`` so that every class is there as often, within one, as it can be."""
        chosen = even_subset(self.labels, n, seed)
        images = self.images
        images = images[chosen] if isinstance(images, Tensor) else replace(images, chosen=images.chosen[chosen])
        masks = None if self.masks is None else self.masks[chosen]
        whole = self.available or len(self)
        return replace(self, images=images, labels=self.labels[chosen], masks=masks, available=whole)

    def fingerprint(self) -> str:
        """Names images, labels and prompts: equal for equal data. Files read as needed are told by name and size."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        if isinstance(self.images, Tensor):
            return digest(self.key, self.images, self.labels, list(self.prompts))
        contents = [self.images.source.contents[i] for i in self.images.chosen.tolist()]
        how = [self.images.side, self.images.preprocess, self.on_bad_image]
        return digest(self.key, contents, how, self.labels, list(self.prompts))


def even_subset(labels: Tensor, n: int | None, seed: int) -> Tensor:
    """Sorted indices of at most ``n`` of ``labels`` ``[N]``, drawn so that classes are there as evenly as can be."""
    if n is None or n >= len(labels):
        return torch.arange(len(labels))
    rank = torch.empty(len(labels), dtype=torch.long)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank[members] = torch.arange(len(members))
    return shuffled[rank[shuffled].argsort(stable=True)][:n].sort().values


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
    Raises ValueError for an unknown key, a missing folder, or an unreadable image unless ``on_bad_image`` is "leave_out".
    """
    if root is None:
        return _load_miniworld(key, split, 1000 if n is None else n, image_size, seed, world)
    folder = existing_root(root)
    spec = DATASETS.get(key)
    source = open_source(key, split, folder, test_fraction, seed)
    labels = torch.tensor(source.labels)
    names = tuple(spec.class_name(raw) if spec else clean_name(raw) for raw in source.classes)
    template = prompt or (spec.prompt if spec else DEFAULT_PROMPT)
    own = spec.preprocess if spec and split == "test" else "crop"
    chosen = even_subset(labels, n, seed)
    data = ImageSet(
        key,
        world or "photographs",
        Undecoded(source, chosen, image_size, preprocess or own),
        labels[chosen],
        names,
        tuple(template.replace("{}", name) for name in names),
        mask_kind="box",
        available=len(labels),
        published=spec is not None
        and split == "test"
        and (len(labels), len(names)) == (spec.images, spec.classes)
        and (preprocess or spec.preprocess, template) == (spec.preprocess, spec.prompt),
        on_bad_image=on_bad_image,
    )
    return data.decoded() if decode and len(data) * 3 * image_size**2 <= KEEP_DECODED else data


def _load_miniworld(key: str, split: Split, n: int, image_size: int, seed: int, world: str | None) -> ImageSet:
    if key not in miniworld.TASKS:
        raise ValueError(f"mini-world task {key!r} is unknown; there are: {', '.join(miniworld.TASKS)}")
    task = miniworld.TASKS[key]
    images, labels, masks = miniworld.task_images(key, n, split, seed)
    if image_size != miniworld.SIDE:
        images = TF.resize(images, [image_size, image_size])
        masks = TF.resize(masks, [image_size, image_size], TF.InterpolationMode.NEAREST)
    return ImageSet(key, world or "mini-world", images, labels, task.class_names, tuple(task.prompts), masks)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _box_mask(box: Box, size: tuple[int, int], side: int, preprocess: Preprocess) -> Tensor:
    mask = Image.new("L", size)
    mask.paste(255, (box[0], box[1], box[2] + 1, box[3] + 1))
    return torch.from_numpy(np.array(fit(mask, side, preprocess, TF.InterpolationMode.NEAREST))) > 127


Pixels = TypeVar("Pixels", Image.Image, Tensor)


def fit(
    image: Pixels, side: int, preprocess: Preprocess, mode: TF.InterpolationMode = TF.InterpolationMode.BILINEAR
) -> Pixels:
    """An image, or images ``[...,H,W]``, at ``side`` x ``side``: "resize" both sides, or "crop" the centre after the shorter side is 256/224 of it."""
    if preprocess == "resize":
        return TF.resize(image, [side, side], mode)
    return TF.center_crop(TF.resize(image, round(side * 256 / 224), mode), [side, side])


if __name__ == "__main__":
    from .datasets_command import main

    sys.exit(main())
