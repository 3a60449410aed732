"""Image sets: the rendered tasks of the mini-world, and photographs in class folders or Tiny-ImageNet's layout."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as TF

from . import miniworld
from .files import digest
from .progress import progress
from .settings import resolve

Split = Literal["train", "test"]
DEFAULT_PROMPT = "This is a photo of a {}"
TEST_FRACTION = 0.2  # of each class, for folders that come without a split
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class ImageSet(torch.utils.data.Dataset):
    """Labelled images of one size, with the prompts of their classes."""

    key: str
    world: str  # "mini-world" or "photographs": results of different worlds are never mixed
    images: Tensor  # [N,3,H,W] uint8
    labels: Tensor  # [N] int64
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]
    masks: Tensor | None = None  # [N,H,W] bool: where the object is
    mask_kind: str = "mask"  # "mask": its exact outline; "box": its bounding box

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first index, images in [0,1], labels), in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield start, self.images[part].to(device).float() / 255, self.labels[part].to(device)

    def subset(self, n: int | None, seed: int = 0) -> "ImageSet":
        """At most ``n`` images, drawn by ``seed`` so that every class is there as often, within one, as it can be."""
        chosen = even_subset(self.labels, n, seed)
        masks = None if self.masks is None else self.masks[chosen]
        return replace(self, images=self.images[chosen], labels=self.labels[chosen], masks=masks)

    def fingerprint(self) -> str:
        """Names images, labels and prompts: equal for equal data."""
        return digest(self.key, self.images, self.labels, list(self.prompts))


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
    """Keys of all image sets: the mini-world's tasks for ``root=None``, else the folders below ``root``."""
    if root is None:
        return list(miniworld.TASKS)
    return [folder.name for folder in _folders(_existing_root(root))]


def load_dataset(
    key: str,
    split: Split,
    root: str | Path | None = None,
    n: int | None = None,
    image_size: int = miniworld.SIDE,
    seed: int = 0,
    crop: bool = True,
) -> ImageSet:
    """The images of one set, decoded to ``image_size`` x ``image_size``.

    ``root=None``: the mini-world, ``key`` a task, ``n`` images (default 1000) rendered anew for each ``seed``. Else
    ``<root>/<key>`` holds Tiny-ImageNet's published layout, ``train`` and ``test`` (or ``val``) with ``<class>/*``
    folders in each, or just ``<class>/*`` folders, perhaps one level further down; the latter are split 80:20 for each
    class by ``seed``, and ``n`` caps the number of images, evenly over classes.
    ``crop``: resize the shorter side to 256/224 of ``image_size`` and centre-crop, as ViT-B/32 sees 224; otherwise
    resize both sides. Bilinear, by PIL. Raises ValueError for an unknown key, a missing folder or an unreadable image.
    """
    if root is None:
        return _load_miniworld(key, split, 1000 if n is None else n, image_size, seed)
    folder = _existing_root(root) / key
    if not folder.is_dir():
        raise ValueError(f"image set {key!r} is not in {folder.parent}; there are: {', '.join(list_datasets(root))}")
    if (folder / "wnids.txt").exists():
        files, labels, names, boxes = _tiny_imagenet(folder, split)
    else:
        files, labels, names = _class_folders(folder, split, seed)
        boxes = None
    if not files:
        raise ValueError(f"image set {key!r}: no {split} images below {folder}")
    chosen = even_subset(torch.tensor(labels), n, seed)
    images = torch.empty(len(chosen), 3, image_size, image_size, dtype=torch.uint8)
    masks = torch.empty(len(chosen), image_size, image_size, dtype=torch.bool) if boxes else None
    for row, i in enumerate(progress(chosen.tolist(), desc=f"read {key} {split}", leave=False)):
        images[row], mask = _decode(files[i], boxes and boxes[i], image_size, crop)
        if masks is not None:
            masks[row] = mask
    prompts = tuple(DEFAULT_PROMPT.format(name) for name in names)
    return ImageSet(key, "photographs", images, torch.tensor(labels)[chosen], tuple(names), prompts, masks, "box")


def _load_miniworld(key: str, split: Split, n: int, image_size: int, seed: int) -> ImageSet:
    if key not in miniworld.TASKS:
        raise ValueError(f"mini-world task {key!r} is unknown; there are: {', '.join(miniworld.TASKS)}")
    task = miniworld.TASKS[key]
    images, labels, masks = miniworld.task_images(key, n, split, seed)
    if image_size != miniworld.SIDE:
        images = TF.resize(images, [image_size, image_size])
        masks = TF.resize(masks, [image_size, image_size], TF.InterpolationMode.NEAREST)
    return ImageSet(key, "mini-world", images, labels, task.class_names, tuple(task.prompts), masks)


def _existing_root(root: str | Path) -> Path:
    folder = resolve(root)
    if not folder.is_dir():
        raise ValueError(f"data_root {str(root)!r} is not a folder")
    return folder


def clean_name(name: str) -> str:
    """A class name as prompts have it: lower case, ``_ - /`` to spaces, without a leading "017." or "017_"."""
    return re.sub(r"[_\-/]", " ", re.sub(r"^\d{3}[._]", "", name)).strip().lower()


def _class_folders(folder: Path, split: Split, seed: int) -> tuple[list[Path], list[int], list[str]]:
    while len(inner := _folders(folder)) == 1 and _folders(inner[0]):
        folder = inner[0]
    parts = {p.name: p for p in inner}
    has_split = "train" in parts and bool({"test", "val"} & set(parts))
    if has_split:
        inner = _folders(parts["train"] if split == "train" else parts.get("test", parts.get("val")))
    classes = [p for p in inner if p.name != "BACKGROUND_Google" and _images(p)]
    files: list[Path] = []
    labels: list[int] = []
    for label, directory in enumerate(classes):
        paths = _images(directory)
        if has_split:
            files += paths
            labels += [label] * len(paths)
            continue
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(TEST_FRACTION * len(paths))) if len(paths) > 1 else 0
        chosen = order[:held_out] if split == "test" else order[held_out:]
        files += [paths[i] for i in sorted(chosen)]
        labels += [label] * len(chosen)
    return files, labels, [clean_name(p.name) for p in classes]


def _folders(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, inclusive


def _tiny_imagenet(folder: Path, split: Split) -> tuple[list[Path], list[int], list[str], list[Box]]:
    """Tiny-ImageNet as published: train in wnid folders, val flat with val_annotations.txt, boxes for both.

    Classes are those of wnids.txt whose train folder is there.
    """
    words = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines() if "\t" in line)
    wnids = [w for w in (folder / "wnids.txt").read_text().split() if (folder / "train" / w).is_dir()]
    label = {wnid: i for i, wnid in enumerate(sorted(wnids))}
    names = [clean_name(words.get(wnid, wnid).split(",")[0]) for wnid in sorted(wnids)]
    rows: list[tuple[Path, int, Box]] = []
    if split == "test":
        for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
            name, wnid, *box = line.split("\t")
            if wnid in label:
                rows.append((folder / "val" / "images" / name, label[wnid], tuple(map(int, box))))
    else:
        for wnid in label:
            for line in (folder / "train" / wnid / f"{wnid}_boxes.txt").read_text().splitlines():
                name, *box = line.split("\t")
                rows.append((folder / "train" / wnid / "images" / name, label[wnid], tuple(map(int, box))))
    files, labels, boxes = zip(*rows) if rows else ((), (), ())
    return list(files), list(labels), names, list(boxes)


def _decode(path: Path, box: Box | None, image_size: int, crop: bool) -> tuple[Tensor, Tensor | None]:
    """(image ``[3,S,S]`` uint8, mask of the box ``[S,S]`` bool)."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None
    pixels = torch.from_numpy(np.array(_fit(image, image_size, crop, Image.Resampling.BILINEAR))).permute(2, 0, 1)
    if box is None:
        return pixels, None
    mask = Image.new("L", image.size)
    mask.paste(255, (box[0], box[1], box[2] + 1, box[3] + 1))
    return pixels, torch.from_numpy(np.array(_fit(mask, image_size, crop, Image.Resampling.NEAREST))) > 127


def _fit(image: Image.Image, size: int, crop: bool, resample: Image.Resampling) -> Image.Image:
    mode = TF.InterpolationMode.BILINEAR if resample == Image.Resampling.BILINEAR else TF.InterpolationMode.NEAREST
    if not crop:
        return TF.resize(image, [size, size], mode)
    return TF.center_crop(TF.resize(image, round(size * 256 / 224), mode), [size, size])
