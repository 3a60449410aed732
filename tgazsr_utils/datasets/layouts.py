"""What image sets look like on the disk: which are there, and their lists of images, nothing decoded yet.

The published layouts, through torchvision's own classes where it has them; Tiny-ImageNet's; and class folders.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import h5py
import torch
import torchvision.datasets
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import Dataset

from tgazsr_utils.core.seeds import digest
from tgazsr_utils.datasets import miniworld
from tgazsr_utils.datasets.published_sets import DATASETS, DatasetSpec
from tgazsr_utils.paths import resolve

Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
TEST_FRACTION = 0.2  # of each class, for folders that come without a split

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


def list_datasets(root: str | Path | None) -> list[str]:
    """Keys of all image sets: the mini-world's tasks for ``root=None``, else what lies below ``root``.

    Published sets come first, in the order of ``DATASETS``; then other folders of class folders, by name.
    """
    if root is None:
        return list(miniworld.TASKS)
    folder = existing_root(root)
    there = [key for key in DATASETS if is_there(key, folder)]
    known = {name for key in there for name in (key, DATASETS[key].folder)}
    return there + [p.name for p in _folders(folder) if p.name not in known]


def existing_root(root: str | Path) -> Path:
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
        reason = reason.replace(
            "You can use download=True to download it", f"(python -m tgazsr_utils.datasets fetch {key})"
        )
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
    return [
        f"{os.path.relpath(path, root)} {os.stat(path).st_size if os.path.exists(path) else 'missing'}"
        for path in files
    ]


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

    Classes are those of wnids.txt whose train folder is there. Raises ValueError, with file and line, for lists that do not
    fit each other or the images that are there.
    """
    listed = (folder / "wnids.txt").read_text().split()
    wnids = sorted(wnid for wnid in listed if (folder / "train" / wnid).is_dir())
    words = dict(row for row, _ in _rows(folder / "words.txt", 2, 0))
    unnamed = [wnid for wnid in wnids if wnid not in words]
    if unnamed:
        raise ValueError(f"{folder / 'words.txt'} has no name for {', '.join(unnamed[:3])}")
    label = {wnid: i for i, wnid in enumerate(wnids)}
    found: list[tuple[Path, int, Box]] = []
    if split == "test":
        images, annotations = folder / "val" / "images", folder / "val" / "val_annotations.txt"
        rows = list(_rows(annotations, 2, 4))
        unknown = [wnid for (_, wnid), _ in rows if wnid not in listed]
        if unknown:
            raise ValueError(f"{annotations} has {unknown[0]!r}, which wnids.txt has not")
        _all_listed(images, annotations, [name for (name, _), _ in rows])
        found += [(images / name, label[wnid], box) for (name, wnid), box in rows if wnid in label]
    else:
        for wnid in wnids:
            images, boxes = folder / "train" / wnid / "images", folder / "train" / wnid / f"{wnid}_boxes.txt"
            rows = list(_rows(boxes, 1, 4))
            _all_listed(images, boxes, [name for (name,), _ in rows])
            found += [(images / name, label[wnid], box) for (name,), box in rows]
    files, labels, boxes = zip(*found) if found else ((), (), ())
    return _from_files(files, labels, [words[wnid].split(",")[0] for wnid in wnids], folder, list(boxes))


def _rows(path: Path, texts: int, numbers: int) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Of a list with tabs. Raises ValueError for a line of another form."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        parts = line.split("\t")
        if len(parts) != texts + numbers or not all(part.strip().isdecimal() for part in parts[texts:]):
            raise ValueError(
                f"{path}, line {number}, {line[:60]!r} is not {texts} texts and {numbers} numbers with tabs between"
            )
        yield parts[:texts], tuple(map(int, parts[texts:]))


def _all_listed(images: Path, path: Path, listed: list[str]) -> None:
    there = {image.name for image in _images(images)}
    if len(set(listed)) < len(listed) or there - set(listed):
        raise ValueError(f"{path} lists {len(listed)} images, {images} holds {len(there)}; has the list been cut?")
