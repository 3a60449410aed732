"""What image sets look like on the disk: which are there, and their lists of images, nothing decoded yet.

The published layouts, through torchvision's own classes where it has them; Tiny-ImageNet's; and class folders.
"""

import atexit
import os
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tgazsr_utils.core.libraries import torchvision
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.datasets import miniworld
from tgazsr_utils.datasets.class_folders import (
    Box,
    Source,
    Split,
    class_folders,
    folders,
    from_files,
    images_below,
    readable,
)
from tgazsr_utils.datasets.published_sets import KNOWN, DatasetSpec, clean_name, without_running_numbers
from tgazsr_utils.datasets.torchvision_sets import read_lists
from tgazsr_utils.paths import files_below, resolve

TEST_FRACTION = 0.2  # of each class, for folders that come without a split


def list_datasets(root: str | Path | None) -> list[str]:
    """Keys of all image sets: the mini-world's tasks for ``root=None``, else what lies below ``root``.

    Published sets come first, in the order of ``KNOWN``; then other folders of class folders, by name.
    """
    if root is None:
        return list(miniworld.TASKS)
    folder = existing_root(root)
    there = {key: find_published(key, folder).top for key in KNOWN}
    known = {*KNOWN, *(name for names in there.values() for name in names)}
    return [key for key, names in there.items() if names] + [p.name for p in folders(folder) if p.name not in known]


def existing_root(root: str | Path) -> Path:
    """The folder that holds the image sets: ``root``, or what alone lies in it and holds a published set."""
    folder = resolve(root)
    if not folder.is_dir():
        raise ValueError(f"data_root {str(root)!r} is not a folder ({folder})")
    named = lambda path: any(_is_called(key, path) for key in KNOWN)
    while len(inner := folders(folder)) == 1 and not named(inner[0]) and any(map(named, folders(inner[0]))):
        folder = inner[0]
    return folder


def _is_called(key: str, folder: Path) -> bool:
    """Has a folder one of a published set's names, whatever their case and punctuation?"""
    spec, plain = KNOWN[key], lambda name: re.sub(r"[\W_]", "", name).lower()
    return plain(folder.name) in map(plain, (key, spec.folder, spec.title, *spec.also))


class Place(NamedTuple):
    """Where a published set lies."""

    folder: Path  # what stands for the published layout's own folder
    missing: list[str]  # what that lacks
    own: list[Path]  # folders that may hold it as class folders instead
    top: list[str]  # folders of the data root with something of it; none: it is not there


def find_published(key: str, root: Path) -> Place:
    """Where, up to two levels below ``root``, least of the published layout is missing.

    A folder with all of it may have any name, as archives unpack one level up or down; one with less is called as the
    set. Tiny-ImageNet, ImageNet and further sets are by name only: a set of one's own may be laid out like them.
    """
    spec, upper = KNOWN[key], folders(root)
    anywhere = [root, *upper, *(lower for folder in upper for lower in folders(folder))]
    named = [root / spec.folder, *(place for place in anywhere if _is_called(key, place))]
    lacks = lambda place: [place / part for part in spec.below if not os.path.exists(place / part)]
    places = named + anywhere if spec.torchvision else named
    place = next((p for p in places if not lacks(p)), None) or min(named, key=lambda p: len(lacks(p)))
    missing, called = lacks(place), [folder for folder in upper if _is_called(key, folder)]
    half = 0 < len(missing) < len(spec.needs)  # what holds a part of the published layout is no folder of class folders
    own = sorted((f for f in called if not (half and place.is_relative_to(f))), key=lambda folder: folder.name != key)
    there = own[:1] if missing and own else {place / part for part in spec.below} - {*missing}
    if place == root and _is_called(key, root):
        there = [*there, *upper]
    top = sorted({path.relative_to(root).parts[0] for path in there or called})
    return Place(place, [os.path.relpath(path, root) for path in missing], own, top)


def open_source(key: str, split: Split, root: Path, test_fraction: float | None = None, seed: int = 0) -> Source:
    """Finds one part of a set below ``root`` and reads its lists; see ``load_dataset``.

    Raises ValueError, in one line, whatever is wrong with what lies there.
    """
    try:
        return _find_source(key, split, root, test_fraction, seed)
    except Exception as error:  # torchvision lets through whatever the parser of a damaged list raises
        reason = readable(" ".join(str(error).split())) or type(error).__name__
        reason = f"{reason} is not in its lists" if isinstance(error, KeyError) else reason
        fetch = f"Once it is moved away: python -m tgazsr_utils.datasets fetch {key}"
        reason = reason.replace("You can use download=True to download it", fetch)
        missing = find_published(key, root).missing if key in KNOWN else []
        if missing and missing[0] not in reason:
            reason += f"; of the published layout this is missing: {', '.join(missing)}"
        raise ValueError(f"image set {key!r} in {root} cannot be read: {reason}") from error


def _find_source(key: str, split: Split, root: Path, test_fraction: float | None, seed: int) -> Source:
    spec = KNOWN.get(key)
    place, missing = find_published(key, root)[:2] if spec else (root, [])
    if spec and spec.torchvision and not spec.folders and not missing:
        folder, source = "its lists", _through_torchvision(key, spec, place, split)
    elif ((folder := _folder_of(key, split, root)) / "wnids.txt").exists():
        source = _tiny_imagenet(folder, split, published=spec is not None)
    else:
        fraction = TEST_FRACTION if test_fraction is None and spec is None else test_fraction
        whole = spec is not None and spec.train_folders is not None and _part(place, spec.train_folders).is_dir()
        source = class_folders(folder, split, fraction, seed, whole, published=spec is not None)
        folder = f"class folders below {folder}"
    if not source.labels:
        raise ValueError("; ".join([f"no {split} images in {folder}", *source.left_out[:3]]))
    if len(gone := source.missing()) == len(source.labels):
        raise ValueError(f"none of the {len(gone)} images of its lists is there, such as {gone[0]}")
    if len(source.classes) < 2:
        raise ValueError(f"only one class, {source.classes[0]!r}, in {folder}; are its images in class folders?")
    return source


def _folder_of(key: str, split: Split, root: Path) -> Path:
    """The folder that holds a set's class folders or Tiny-ImageNet's lists. Raises ValueError if there is none."""
    if spec := KNOWN.get(key):
        place, missing, own, there = find_published(key, root)
        if key == "tinyImageNet" and not missing:
            return place
        part = spec.folders if split == "test" else spec.train_folders or spec.folders
        tried = ([_part(place, part)] if part else []) + own
    else:
        tried, there = [root / key], []
    for folder in tried:
        if folder.is_dir():
            return folder
    if there:
        raise ValueError(f"missing: {', '.join(missing)}" if missing else f"it has no part to {split} on")
    raise ValueError(f"it is not there; there are: {', '.join(list_datasets(root)) or 'none'}")


def _part(place: Path, published: str) -> Path:
    """What is published as ``published``, below the folder that stands for the first one of that path."""
    return place / published.partition("/")[2]


@cache
def _root_of(folder: Path, name: str) -> Path:
    """A folder where ``folder`` is called ``name``, as torchvision has it; until the program ends."""
    if folder.name == name:
        return folder.parent
    temporary = TemporaryDirectory(prefix="tgazsr_")
    atexit.register(temporary.cleanup)
    (Path(temporary.name) / name).symlink_to(folder, target_is_directory=True)
    return Path(temporary.name)


def _through_torchvision(key: str, spec: DatasetSpec, place: Path, split: Split) -> Source:
    """A published set through torchvision's own class; images of a folder in the order of their names."""
    arguments = spec.test if split == "test" else spec.train
    if arguments is None:
        raise ValueError("it has no part to train on; choose another set, or class folders of your own")
    root = _root_of(place, spec.folder)
    lists = read_lists(spec.torchvision, root, arguments)
    classes = lists.classes or sorted(spec.names)
    if lists.files is not None:
        in_order = sorted(zip(lists.files, lists.labels))  # torchvision lists some in the order of the file system
        files = [place / path.relative_to(root / spec.folder) for path, _ in in_order]
        labels = [label for _, label in in_order]
        return from_files(files, labels, classes, place, published=True)
    where = [f"{key} {split} number {i}" for i in range(len(lists.labels))]
    if lists.contents is not None:
        return Source(lists.labels, classes, where, lists.open, lists.contents)
    files = files_below(place)  # such as HDF5, which are read as images are needed
    contents = [f"{one} of {digest([(name, size) for name, size, _ in files])}" for one in where]
    return Source(lists.labels, classes, where, lists.open, contents, [max(time for *_, time in files)] * len(where))


def class_names(source: Source, spec: DatasetSpec | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to call each class, each name once, and how the set's own prompts name it."""
    raw = [
        _raw_name(_wnid(name) if spec and spec.numbered else name) for name in without_running_numbers(source.classes)
    ]
    names = list(map(spec.label if spec else clean_name, raw))
    distinct = [f"{own} ({of})" if names.count(own) > 1 else own for own, of in zip(names, source.classes)]
    return tuple(distinct), tuple(map(spec.class_name, raw)) if spec else tuple(names)


def _wnid(number: str) -> str:
    """Of one of ImageNet's 1000 classes; what is no number of one, as it is."""
    return _wordnet("1k").index_to_label_name(int(number)) if re.fullmatch(r"\d{1,3}", number) else number


def _raw_name(folder_name: str) -> str:
    """The first lemma of a WordNet id such as n01440764; any other name as it is."""
    if not re.fullmatch(r"n\d{8}", folder_name):
        return folder_name
    try:
        return _wordnet("22k").label_name_to_description(folder_name).split(",")[0]
    except KeyError:
        return folder_name


@lru_cache(maxsize=2)
def _wordnet(classes: str) -> Any:
    torchvision()  # which timm imports, and which may need mending first
    from timm.data import ImageNetInfo  # slow to import

    return ImageNetInfo(f"imagenet-{classes}")


def _tiny_imagenet(folder: Path, split: Split, published: bool) -> Source:
    """Tiny-ImageNet: train in wnid folders; val flat with val_annotations.txt, or sorted into wnid folders.

    Classes are those of wnids.txt whose train folder is there; boxes are there if all of their lists are. Raises
    ValueError, with file and line, for lists that do not fit each other or the images that are there.
    """
    listed = (folder / "wnids.txt").read_text(encoding="utf-8").split()
    wnids = sorted(wnid for wnid in listed if (folder / "train" / wnid).is_dir())
    words = dict(row for row, _ in _rows(folder / "words.txt", 2, 0))
    unnamed = [wnid for wnid in wnids if wnid not in words]
    if unnamed:
        raise ValueError(f"{folder / 'words.txt'} has no name for {', '.join(unnamed[:3])}")
    base = next((folder / name for name in ("val", "val_") if (folder / name).is_dir()), folder / "val")
    base = folder / "train" if split == "train" else base
    lists = {wnid: base / wnid / f"{wnid}_boxes.txt" for wnid in wnids}
    if split == "test" and (base / "val_annotations.txt").exists():
        found = _annotated(base / "images", base / "val_annotations.txt", set(listed))
    elif split == "train" and all(path.exists() for path in lists.values()):
        found = [entry for w, path in lists.items() for entry in _annotated(base / w / "images", path, {w}, wnid=w)]
    else:
        found = [(path, w, None) for w in wnids if (base / w).is_dir() for path in images_below(base / w)[0]]
        if not found:
            raise ValueError(f"{base} has neither val_annotations.txt nor images in folders named after wnids.txt")
    label = {wnid: i for i, wnid in enumerate(wnids)}
    kept = [entry for entry in found if entry[1] in label]
    files, of, boxes = ([entry[i] for entry in kept] for i in range(3))
    names = [words[wnid].split(",")[0] for wnid in wnids]
    boxes = None if None in boxes else boxes
    told = [f"class {names[label[wnid]]} has no images to {split} on" for wnid in wnids if wnid not in {*of}]
    if gone := [wnid for wnid in listed if wnid not in label]:
        told.append(f"{len(gone)} classes of wnids.txt have no folder in train, such as {gone[0]}")
    labels = [label[wnid] for wnid in of]
    return from_files(files, labels, names, folder, published=published, boxes=boxes, left_out=tuple(told))


def _annotated(images: Path, path: Path, wnids: set[str], wnid: str | None = None) -> list[tuple[Path, str, Box]]:
    """(file, wnid, box) of each image in the list at ``path``; ``wnid``: that of all, where the list has none."""
    rows = list(_rows(path, 1 if wnid else 2, 4))
    found = [(images / names[0], wnid or names[1], box) for names, box in rows]
    unknown = [of for _, of, _ in found if of not in wnids]
    if unknown:
        raise ValueError(f"{path} has {unknown[0]!r}, which wnids.txt has not")
    there, named = {image.name for image in images_below(images)[0]}, {file.name for file, _, _ in found}
    if len(named) < len(found) or there - named:
        raise ValueError(f"{path} lists {len(found)} images, {images} holds {len(there)}; has the list been cut?")
    return found


def _rows(path: Path, texts: int, numbers: int) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """(texts, numbers) of each line of a list with tabs. Raises ValueError for a line of another form."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split("\t")
        if len(parts) != texts + numbers or not all(part.strip().isdecimal() for part in parts[texts:]):
            raise ValueError(
                f"{path}, line {number}, {line[:60]!r} is not {texts} texts and {numbers} numbers with tabs between"
            )
        yield parts[:texts], tuple(map(int, parts[texts:]))
