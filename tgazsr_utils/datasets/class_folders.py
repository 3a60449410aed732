"""Class folders: a set whose images lie in folders named after their classes, perhaps in parts to train and test on."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from tgazsr_utils.datasets.decoding import image_suffixes, read_as_published, read_rgb

Split = Literal["train", "test"]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, inclusive
# Words that name parts; of several to test on the first one that has labels.
PARTS = {
    "train": ("train", "training", "trainval"),
    "test": ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "heldout"),
}
_BESIDE = "(?:set|sets|data|dataset|images?|imgs?|photos?|pictures?|samples?|split|part|subset|folder|the)*"
# What operating systems and archives leave behind, besides all that is hidden.
LITTER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_MISSING = "missing"  # in the place of a size


@dataclass(frozen=True, eq=False)
class Source:
    """One part of a set as it lies on the disk, nothing decoded yet."""

    labels: list[int]
    classes: list[str]  # raw names
    where: list[str]  # what to call each image in an error: its file
    open: Callable[[int], Image.Image]
    contents: list[Any]  # what tells these images from others, on any machine: for a fingerprint
    modified: Sequence[int] = ()  # times of their files, in ns; none, where contents are digests of the images
    boxes: list[Box] | None = None
    left_out: tuple[str, ...] = ()  # what is there and not taken, a line each

    def missing(self) -> list[str]:
        """Which of its files are not there."""
        return [where for where, what in zip(self.where, self.contents) if str(what).endswith(_MISSING)]


def class_folders(
    folder: Path, split: Split, test_fraction: float | None, seed: int, whole: bool, published: bool
) -> Source:
    """One part of the class folders below ``folder``; labels count all classes of either part, by name.

    ``whole``: all images are of this part, whatever ``test_fraction`` says. ``published``: see ``decoding``. Raises
    ValueError where parts are named and one is missing.
    """
    while len(inner := folders(folder)) == 1 and folders(inner[0]):
        folder = inner[0]
    parts, told = _parts(inner)
    if parts:
        whole = True
        if split not in parts:
            there, known = (", ".join(names) for names in ([part.name for part in inner], PARTS[split]))
            raise ValueError(f"{folder} has {there} and no part to {split} on; words for one are {known}")
    beside = [path for part in (folder, *parts.values()) for path in _files(part)]
    if beside := [path for path in beside if _is_image(path) or not path.exists()]:
        told.append(f"{len(beside)} images or links to nothing lie in no class folder, such as {_some(beside, folder)}")
    files: list[Path] = []
    labels: list[int] = []
    classes, others, nested = [], [], True
    for name, directories in _by_class(parts.values() or [folder]):
        found = {directory: images_below(directory) for directory in directories}
        others += [path for _, rest in found.values() for path in rest]
        if not any(images for images, _ in found.values()):
            told.append(f"class folder {name} has no images")
            continue
        of_part = [d for d in directories if not parts or d.parent == parts[split]]
        paths = [path for directory in of_part for path in found[directory][0]]
        if not paths:
            told.append(f"class {name} has no images to {split} on")
        chosen = paths if whole else _part_of_class(paths, split, test_fraction, seed)
        files += chosen
        labels += [len(classes)] * len(chosen)
        classes.append(name)
        parents = {path.parent for path in paths}
        nested = nested and len(parents) > 1 and not parents & {*of_part}  # no image of the class folder's own
    if nested and files:
        sets = f"{', '.join(classes[:3])} are image sets: give data_root {folder}"
        told.append(f"all images lie in several folders of each class folder; if those are the classes, {sets}")
    if others:
        told.append(f"{len(others)} files are no images that can be read, such as {_some(others, folder)}")
    return from_files(files, labels, classes, folder, published=published, left_out=tuple(told))


def _by_class(parts: Iterable[Path]) -> list[tuple[str, list[Path]]]:
    """Each class, by name, with its folders in the parts, whatever Unicode form and case its name has in each."""
    named: dict[str, list[Path]] = {}
    alike: dict[str, list[str]] = {}
    for directory in (directory for part in parts for directory in folders(part)):
        if (name := unicodedata.normalize("NFC", directory.name)) != "BACKGROUND_Google":  # of Caltech-101, no class
            named.setdefault(name, []).append(directory)
            alike.setdefault(_plain(name), []).append(name)
    found: dict[str, list[Path]] = {}
    for names in map(list, map(dict.fromkeys, alike.values())):
        places = [directory.parent for name in names for directory in named[name]]
        one = len({*places}) == len(places)  # else a part tells them apart
        for name in names:
            found.setdefault(names[0] if one else name, []).extend(named[name])
    return sorted(found.items())


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _named_part(folder: Path, words: Sequence[str]) -> str | None:
    """The word for a part that a folder's name has: "train" in Training_Set_2017."""
    letters = re.sub(r"[\W\d_]", "", folder.name.lower())
    return next((word for word in words if re.fullmatch(f"{_BESIDE}{word}{_BESIDE}", letters)), None)


def _parts(inner: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """(the folders to train and to test on, by "train" and "test"; what is left out), unless there are no parts.

    There are if both are named, or if nothing else is there.
    """
    named = {
        part: [p for word in words for p in inner if _named_part(p, words) == word] for part, words in PARTS.items()
    }
    if not (named["train"] and named["test"]) and len(named["train"]) + len(named["test"]) < len(inner):
        return {}, []
    parts = dict(zip(["train"], named["train"]))
    classes = {_plain(folder.name) for part in parts.values() for folder in folders(part)}
    told = [f"folder {p.name} is no part" for p in inner if p not in named["train"] + named["test"]]
    told += [f"folder {p.name} is not read, as {parts['train'].name} is" for p in named["train"][1:]]
    for folder in named["test"]:
        if "test" not in parts:
            there = {_plain(folder.name) for folder in folders(folder)}
            if there & classes if classes else len(there) > 1:
                parts["test"] = folder
            else:
                told.append(f"{folder.name} has no class folders of the names in the part to train on")
    return parts, told


def _part_of_class(paths: list[Path], split: Split, test_fraction: float | None, seed: int) -> list[Path]:
    """A class's images of one part, drawn by ``seed``: at least one to test on of several.

    None: all to test on; 1: all to test on, and to tune on as well.
    """
    if test_fraction == 1:
        return paths
    if test_fraction is None:
        held_out = len(paths)
    else:
        held_out = max(1, round(test_fraction * len(paths))) if len(paths) > 1 else 0
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    return [paths[i] for i in sorted(order[:held_out] if split == "test" else order[held_out:])]


def folders(directory: Path) -> list[Path]:
    """Folders in a folder, by name, but for litter and links to what the folder itself lies in."""
    if not os.access(directory, os.R_OK | os.X_OK):
        return []
    with os.scandir(directory) as entries:
        found = [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False) or e.is_symlink() and _leads_away(e)]
    return sorted(path for path in found if not _is_litter(path.name))


def _leads_away(link: os.DirEntry) -> bool:
    here = Path(os.path.realpath(os.path.dirname(link)))
    return os.path.isdir(link) and not here.is_relative_to(os.path.realpath(link))


def images_below(directory: Path) -> tuple[list[Path], list[Path]]:
    """Image files in a folder and below it, by path, and files that are no images that can be read."""
    files, seen, waiting = [], set(), [directory]
    while waiting:
        here = waiting.pop()
        if (real := os.path.realpath(here)) not in seen:  # links may lead in a circle
            seen.add(real)
            files += _files(here)
            waiting += folders(here)
    images = [path for path in sorted(files) if _is_image(path)]
    return images, sorted(set(files) - set(images))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not path.is_dir() and not _is_litter(path.name))


def _is_image(path: Path) -> bool:
    """Is it named as one, and a file or a link to nothing? A pipe would be waited for."""
    return path.suffix.lower() in image_suffixes() and (path.is_file() or not path.exists())


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _some(paths: Iterable[Path], root: Path, most: int = 5) -> str:
    names = [os.path.relpath(path, root) for path in paths]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def from_files(
    files: Sequence[Path],
    labels: Sequence[int],
    classes: list[str],
    root: Path,
    *,
    published: bool,
    boxes: list[Box] | None = None,
    left_out: tuple[str, ...] = (),
) -> Source:
    """Images in files, told from others by their names below ``root`` and sizes; published sets are read as such."""
    paths = [str(path) for path in files]
    states = [os.stat(path) if os.path.exists(path) else None for path in paths]
    sizes, modified = zip(*((s.st_size, s.st_mtime_ns) if s else (_MISSING, 0) for s in states)) if states else ((), ())
    contents = [f"{os.path.relpath(path, root)} {size}" for path, size in zip(paths, sizes)]
    read = read_as_published if published else read_rgb
    where, classes, told = (list(map(readable, texts)) for texts in (paths, classes, left_out))
    return Source(
        list(labels), classes, where, lambda index: read(paths[index]), contents, modified, boxes, tuple(told)
    )


def readable(text: str) -> str:
    """A text with names of files, of which bytes that are no UTF-8 are taken for Latin-1."""
    return re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xDC00), text)
