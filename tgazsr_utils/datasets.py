"""Image sets: the mini-world's rendered tasks, the published sets, and class folders of your own photographs.

``python -m tgazsr_utils.datasets`` lists, checks and fetches the published sets.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF

from . import miniworld
from .files import digest
from .progress import progress
from .published_sets import DATASETS, DEFAULT_PROMPT, DatasetSpec, Preprocess, clean_name
from .settings import resolve

Split = Literal["train", "test"]
OnBadImage = Literal["stop", "leave_out"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
TEST_FRACTION = 0.2  # of each class, for folders that come without a split
KEEP_DECODED = 2**28  # bytes: a set up to this size is decoded once, a larger one anew each time it is read

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, inclusive


@dataclass(frozen=True, eq=False)
class Source:
    """One part of a set as it lies on the disk, nothing decoded yet."""

    labels: list[int]
    classes: list[str]  # raw names
    where: list[str]  # what to call each image in an error: its file
    open: Callable[[int], Image.Image]
    contents: list[Any]  # what tells these images from others: for a fingerprint
    boxes: list[Box] | None = None


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
    side: int
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
                problems.append(f"image {self.source.where[i]} cannot be read: {reason}")
                continue
            kept.append(row)
            images.append(_to_tensor(fit(image, self.side, self.preprocess)))
            if self.source.boxes:
                masks.append(_box_mask(self.source.boxes[i], image.size, self.side, self.preprocess))
        pixels = torch.stack(images) if images else torch.empty(0, 3, self.side, self.side, dtype=torch.uint8)
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
            parts = ((rows, self.images[rows], None) for rows in chunks)
        else:
            parts = self._decode([chunk.tolist() for chunk in chunks])
        for number, (rows, images, _) in enumerate(parts, start=skip):
            if len(rows):
                moved = images.to(device, non_blocking=images.is_pinned()).float() / 255
                yield Batch(number, rows, moved, self.labels[rows].to(device))

    def _decode(self, chunks: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(rows, images, masks) of each chunk, without those that cannot be read."""
        workers = min(16, os.cpu_count() or 1, len(chunks) // 4)
        cuda = torch.cuda.is_available()
        # The generator keeps the loader from drawing its workers' seed from the global random state.
        options = {"num_workers": workers, "pin_memory": cuda, "generator": torch.Generator().manual_seed(0)}
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


def list_datasets(root: str | Path | None) -> list[str]:
    """Keys of all image sets: the mini-world's tasks for ``root=None``, else what lies below ``root``.

    Published sets come first, in the order of ``DATASETS``; then other folders of class folders, by name.
    """
    if root is None:
        return list(miniworld.TASKS)
    folder = _existing_root(root)
    there = [key for key in DATASETS if is_there(key, folder)]
    known = {name for key in there for name in (key, DATASETS[key].folder)}
    return there + [p.name for p in _folders(folder) if p.name not in known]


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
                open_source(key, "test", _existing_root(root), test_fraction)
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
    folder = _existing_root(root)
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
        tuple(template.format(name) for name in names),
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


def _existing_root(root: str | Path) -> Path:
    folder = resolve(root)
    if not folder.is_dir():
        raise ValueError(f"data_root {str(root)!r} is not a folder")
    return folder


def missing_parts(key: str, root: Path) -> list[str]:
    """What the published layout of a set needs below ``root`` and is not there."""
    return [part for part in DATASETS[key].needs if not (root / part).exists()]


def is_there(key: str, root: Path) -> bool:
    """Is there something of this published set, in its own layout or as class folders?"""
    return (root / key).is_dir() or (root / DATASETS[key].folder).is_dir()


def open_source(key: str, split: Split, root: Path, test_fraction: float | None = None, seed: int = 0) -> Source:
    """Finds one part of a set below ``root`` and reads its lists; see ``load_dataset``."""
    spec = DATASETS.get(key)
    missing = missing_parts(key, root) if spec else []
    folder = root / key
    try:
        if spec and not missing and spec.torchvision and not spec.folders:
            source = _torchvision(key, spec, root, split)
        elif key == "tinyImageNet" and (root / spec.folder).is_dir() and not missing:
            folder = root / spec.folder
            source = _tiny_imagenet(folder, split)
        else:
            part = spec and (spec.folders if split == "test" else spec.train_folders or spec.folders)
            folder = root / part if part and (root / part).is_dir() else folder
            if not folder.is_dir():
                if missing and (root / spec.folder).is_dir():
                    raise ValueError(f"missing: {', '.join(missing)}")
                raise ValueError(f"it is not there; there are: {', '.join(list_datasets(root)) or 'none'}")
            if (folder / "wnids.txt").exists():
                source = _tiny_imagenet(folder, split)
            else:
                fraction = TEST_FRACTION if test_fraction is None and spec is None else test_fraction
                whole = bool(part and spec.train_folders and (root / spec.train_folders).is_dir())
                source = _class_folders(folder, split, fraction, seed, whole)
        if not source.labels:
            raise ValueError(f"no {split} images in class folders below {folder}")
        if len(source.classes) < 2:
            raise ValueError(f"only one class, {source.classes[0]!r}, below {folder}; are its images in class folders?")
    except Exception as error:  # torchvision lets through whatever the parser of a damaged list raises
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason.replace("You can use download=True to download it", f"(python -m tgazsr_utils.datasets fetch {key})")
        raise ValueError(f"image set {key!r} in {root} cannot be read: {reason}") from error
    return source


@lru_cache(maxsize=64)
def _reader(name: str, root: Path, arguments: tuple[tuple[str, Any], ...]) -> Dataset:
    return getattr(torchvision.datasets, name)(str(root), **dict(arguments))


@dataclass(frozen=True)
class _WithReader:
    """Opens images through a torchvision data set, which each process makes for itself."""

    arguments: tuple

    def __call__(self, index: int) -> Image.Image:
        return _reader(*self.arguments)[index][0]


def _torchvision(key: str, spec: DatasetSpec, root: Path, split: Split) -> Source:
    """A published set through torchvision's own class; images of a folder in the order of their names."""
    given = spec.test if split == "test" else spec.train
    if given is None:
        raise ValueError("it has no part to train on; choose another set, or class folders of your own")
    arguments = spec.torchvision, root, tuple(given.items())
    data = _reader(*arguments)
    first = lambda *names: next((getattr(data, name) for name in names if hasattr(data, name)), None)
    labels, files = first("targets", "_labels", "labels", "_samples"), first("_image_files", "_images", "_samples")
    if labels is None:  # PCAM keeps them in a file
        with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{given['split']}_y.h5") as file:
            labels = file["y"][:, 0, 0, 0]
    labels = [int(entry[1] if isinstance(entry, tuple) else entry) for entry in labels]
    classes = list(first("classes") or sorted(spec.name))
    if files is not None:
        paths = [Path(entry[0] if isinstance(entry, tuple) else entry) for entry in files]
        paths, labels = zip(*sorted(zip(paths, labels)))  # torchvision lists some in the order of the file system
        return _from_files(paths, labels, classes, root)
    where, pixels = [f"{key} {split} number {i}" for i in range(len(labels))], first("data")
    contents = where if pixels is None else [digest(torch.from_numpy(row.copy())) for row in pixels]
    return Source(labels, classes, where, _WithReader(arguments), contents)


@dataclass(frozen=True)
class _Files:
    paths: list[str]

    def __call__(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as file:
            return file.convert("RGB")


def _contents(files: list[str], root: Path) -> list[str]:
    return [f"{os.path.relpath(path, root)} {os.stat(path).st_size if os.path.exists(path) else 'missing'}" for path in files]


def _from_files(files: Sequence[Path], labels: Sequence[int], classes: list[str], root: Path, boxes=None) -> Source:
    paths = [str(path) for path in files]
    return Source(list(labels), classes, paths, _Files(paths), _contents(paths, root), boxes)


def _class_folders(folder: Path, split: Split, test_fraction: float | None, seed: int, whole: bool = False) -> Source:
    """Class folders below ``folder``; ``whole``: all of them are of this part, whatever ``test_fraction`` says."""
    while len(inner := _folders(folder)) == 1 and _folders(inner[0]):
        folder = inner[0]
    parts = {p.name: p for p in inner}
    has_split = "train" in parts and bool({"test", "val"} & set(parts))
    if has_split:
        inner = _folders(parts["train"] if split == "train" else next(parts[p] for p in ("test", "val") if p in parts))
    folders = [p for p in inner if p.name != "BACKGROUND_Google" and _images(p)]
    files: list[Path] = []
    labels: list[int] = []
    for label, directory in enumerate(folders):
        paths = _images(directory)
        if not has_split and not whole:
            order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
            held_out = len(paths) if test_fraction is None else 0
            if test_fraction is not None and len(paths) > 1:
                held_out = max(1, round(test_fraction * len(paths)))
            paths = [paths[i] for i in sorted(order[:held_out] if split == "test" else order[held_out:])]
        files += paths
        labels += [label] * len(paths)
    return _from_files(files, labels, [_raw_name(p.name) for p in folders], folder)


def _folders(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def _raw_name(folder_name: str) -> str:
    """The first lemma of a WordNet id such as n01440764; any other name as it is."""
    if not re.fullmatch(r"n\d{8}", folder_name):
        return folder_name
    try:
        return _wordnet().label_name_to_description(folder_name).split(",")[0]
    except KeyError:
        return folder_name


@lru_cache(maxsize=1)
def _wordnet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-22k")


def _tiny_imagenet(folder: Path, split: Split) -> Source:
    """Tiny-ImageNet as published: train in wnid folders, val flat with val_annotations.txt, boxes for both.

    Classes are those of wnids.txt whose train folder is there.
    """
    words = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines() if "\t" in line)
    wnids = sorted(w for w in (folder / "wnids.txt").read_text().split() if (folder / "train" / w).is_dir())
    label = {wnid: i for i, wnid in enumerate(wnids)}
    names = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    rows: list[tuple[Path, int, Box]] = []
    if split == "test":
        for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
            name, wnid, *box = line.split("\t")
            if wnid in label:
                rows.append((folder / "val" / "images" / name, label[wnid], tuple(map(int, box))))
    else:
        for wnid in wnids:
            for line in (folder / "train" / wnid / f"{wnid}_boxes.txt").read_text().splitlines():
                name, *box = line.split("\t")
                rows.append((folder / "train" / wnid / "images" / name, label[wnid], tuple(map(int, box))))
    files, labels, boxes = zip(*rows) if rows else ((), (), ())
    return _from_files(files, labels, names, folder, list(boxes))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _box_mask(box: Box, size: tuple[int, int], side: int, preprocess: Preprocess) -> Tensor:
    mask = Image.new("L", size)
    mask.paste(255, (box[0], box[1], box[2] + 1, box[3] + 1))
    return torch.from_numpy(np.array(fit(mask, side, preprocess, TF.InterpolationMode.NEAREST))) > 127


def fit(
    image: Image.Image, side: int, preprocess: Preprocess, mode: TF.InterpolationMode = TF.InterpolationMode.BILINEAR
) -> Image.Image:
    """An image at ``side`` x ``side``: "resize" both sides, or "crop" the centre after the shorter side is 256/224 of it."""
    if preprocess == "resize":
        return TF.resize(image, [side, side], mode)
    return TF.center_crop(TF.resize(image, round(side * 256 / 224), mode), [side, side])


if __name__ == "__main__":
    from .datasets_command import main

    sys.exit(main())
