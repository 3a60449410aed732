"""Published sets through torchvision's own classes, and what we know of these beyond their documentation.

A torchvision that names things otherwise is refused with the name that is missing, not misread.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import torch
from PIL import Image

from tgazsr_utils.core.libraries import torchvision
from tgazsr_utils.core.seeds import digest


class Attributes(NamedTuple):
    """Where a class keeps its lists: one entry an image, in the order of its indices."""

    labels: str | None  # a number, or a pair (file, number), an image; None: in a file, see ``_pcam_labels``
    files: str | None = None  # a path, or such a pair, an image
    pixels: str | None = None  # uint8 arrays of all images, for sets that are kept in memory
    classes: str | None = "classes"


_OF_FILES = Attributes("_labels", files="_image_files")
ATTRIBUTES = {
    "CIFAR10": Attributes("targets", pixels="data"),
    "CIFAR100": Attributes("targets", pixels="data"),
    "STL10": Attributes("labels", pixels="data"),
    "SUN397": _OF_FILES,
    "Food101": _OF_FILES,
    "Flowers102": _OF_FILES,
    "DTD": _OF_FILES,
    "FGVCAircraft": _OF_FILES,
    "OxfordIIITPet": Attributes("_labels", files="_images"),
    "StanfordCars": Attributes("_samples", files="_samples"),
    "PCAM": Attributes(None, classes=None),
}


class Lists(NamedTuple):
    """What a set holds, nothing decoded yet: one entry an image."""

    labels: list[int]
    classes: list[str]  # raw names; empty where torchvision has none
    files: list[Path] | None  # None: the images do not lie in files of their own
    contents: list[str] | None  # digests of images that are in memory
    open: Callable[[int], Image.Image]


def read_lists(name: str, root: Path, arguments: Mapping[str, Any]) -> Lists:
    """Lists of the set below ``root`` that torchvision's class ``name`` makes with ``arguments``.

    Raises ValueError where this torchvision's class lacks what is read here, and whatever the class itself raises.
    """
    data, kept = reader(name, root, tuple(arguments.items())), ATTRIBUTES[name]
    entries = _attribute(data, kept.labels) if kept.labels else _pcam_labels(root, arguments["split"])
    labels = [int(entry[1] if isinstance(entry, tuple) else entry) for entry in entries]
    files = contents = None
    if kept.files:
        files = [Path(entry[0] if isinstance(entry, tuple) else entry) for entry in _attribute(data, kept.files)]
    if kept.pixels:
        contents = [digest(torch.from_numpy(image.copy())) for image in _attribute(data, kept.pixels)]
    classes = list(_attribute(data, kept.classes)) if kept.classes else []
    return Lists(labels, classes, files, contents, lambda index: data[index][0])


@lru_cache(maxsize=64)
def reader(name: str, root: Path, arguments: tuple[tuple[str, Any], ...]) -> Any:
    """torchvision's data set, which reads its lists (and some all their images) when it is made."""
    return getattr(torchvision().datasets, name)(str(root), **dict(arguments))


def _attribute(data: Any, name: str) -> Any:
    try:
        return getattr(data, name)
    except AttributeError:
        made = f"torchvision {torchvision().__version__}'s {type(data).__name__}"
        raise ValueError(f"{made} has no {name!r}, where its lists are read; another version has") from None


def _pcam_labels(root: Path, split: str) -> Any:
    with h5py.File(root / f"pcam/camelyonpatch_level_2_split_{split}_y.h5") as file:
        return file["y"][:, 0, 0, 0]
