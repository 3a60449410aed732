"""``python -m tgazsr_utils.datasets``: lists, checks and fetches the published sets."""

import argparse
import importlib.util
import shutil
import socket
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gdown
import pandas as pd
import torch

from tgazsr_utils.core.libraries import torchvision
from tgazsr_utils.datasets.class_folders import Split
from tgazsr_utils.datasets.layouts import existing_root, find_published, list_datasets, open_source
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.datasets.published_sets import DATASETS, DEFAULT_ROOT, FURTHER, KNOWN
from tgazsr_utils.paths import resolve
from tgazsr_utils.progress import progress

_ARCHIVES = (".zip", ".tgz", ".gz", ".tar")
_NO_CHECKSUM = {"tinyImageNet", "fgvc_aircraft"}  # half an archive of these cannot be told from a whole one
_PATIENCE = 30  # seconds for a server to say something
_DRIVE = gdown.download
SAMPLES_ROOT = "data/samples"
SAMPLES = {  # class -> photograph in scikit-image's wheel, each CC0, in the public domain or of no known restrictions
    "astronaut": "astronaut.png",
    "brick wall": "brick.png",
    "cat": "chelsea.png",
    "coin": "coins.png",
    "cup of coffee": "coffee.png",
    "galaxy": "hubble_deep_field.jpg",
    "photographer": "camera.png",
    "rocket": "rocket.jpg",
}


def list_sets(root: Path, keys: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """(a row a published set: what it holds, what it costs to download, whether it is there; what is wrong there)."""
    rows, problems = [], []
    for key in keys:
        s, there = KNOWN[key], "no"
        try:
            if root.is_dir() and find_published(key, root).top:
                there = "yes"
                for split in _parts(key, root):  # never a yes to what ``check`` then refuses
                    if gone := open_source(key, split, root).missing():
                        raise ValueError(f"image set {key!r} in {root} lacks {len(gone)} images, such as {gone[0]}")
        except ValueError as error:
            there = "incomplete"
            problems.append(str(error))
        rows.append((s.images, s.classes, s.split, f"{s.gigabytes:g} GB", there, s.licence))
    return pd.DataFrame(rows, keys, ["images", "classes", "split", "size", "there", "licence"]), problems


def check_set(key: str, root: Path, every_image: bool = False) -> tuple[bool, list[str]]:
    """Reads a set's lists and one image of each class, or all images; (is it readable, lines that say what was found).

    Of ImageNet this is the part to test on, of all others all of it.
    """
    spec = KNOWN.get(key)
    options = {"image_size": 8, "on_bad_image": "leave_out", "decode": False}
    try:
        parts = [load_dataset(key, split, root, **options) for split in _parts(key, root)]
    except ValueError as error:
        return False, [str(error), *by_hand(key, root)]
    images = len(parts[0]) if spec else sum(map(len, parts))
    prompts, found = parts[0].prompts, f"{images:,} images, {len(parts[0].prompts)} classes"
    if parts[0].published:
        found = f"as published: {found}"
    elif spec:
        found = f"usable, but not the published set: {found} instead of {spec.images:,} and {spec.classes}"
    found += f", and {len(parts[1]):,} images to tune on" if spec and len(parts) > 1 else ""
    some = prompts if len(prompts) <= 4 else (*prompts[:3], "...", prompts[-1])
    lines = [found, "prompts: " + "; ".join(some)]
    chosen = [torch.arange(len(part)) if every_image else _one_of_each_class(part.labels) for part in parts]
    total = sum(map(len, chosen))
    with progress(total=total, desc=f"decode {key}", unit="image", leave=False) as bar:
        for part, rows in zip(parts, chosen):
            for batch in part.batches(rows.split(64)):
                bar.update(len(batch.rows))
    bad = sum(len(part.images.unreadable) for part in parts)
    lines.append(f"{total - bad:,} of {total:,} images decoded{'' if every_image else ', one of each class'}")
    if gone := [where for part in parts for where in part.images.source.missing()]:
        lines.append(f"{len(gone):,} images are not there, such as {gone[0]}")
    return not bad and not gone, lines


def _parts(key: str, root: Path) -> list[Split]:
    """Parts to check, that to test on first; what comes by hand may come without one to tune on."""
    spec = KNOWN.get(key)
    if spec and (find_published(key, root).missing or not (spec.train or key == "tinyImageNet")):
        return ["test"]
    try:
        if spec and spec.by_hand:
            open_source(key, "train", root)
    except ValueError:
        return ["test"]
    return ["test", "train"]


def _one_of_each_class(labels: torch.Tensor) -> torch.Tensor:
    """Rows of the first image of each class among ``labels`` ``[N]``."""
    first = {label: row for row, label in reversed(list(enumerate(labels.tolist())))}
    return torch.tensor(sorted(first.values()))


def by_hand(key: str, root: Path) -> list[str]:
    """Where to get a published set when it cannot be downloaded by program, and where to put it."""
    if key not in KNOWN:
        return []
    spec = KNOWN[key]
    what = spec.by_hand or "unpack what is offered there"
    return [f"source: {spec.source}", f"by hand: in {root}, {what}; looked for: {', '.join(spec.needs)}"]


@contextmanager
def _members_stay_inside(checked: bool) -> Iterator[None]:
    """Within, tar archives cannot write elsewhere (zipfile sees to that itself).

    A Python that is too old for that unpacks only archives whose checksum is ``checked``.
    """
    safe = getattr(tarfile, "data_filter", None)
    if safe is None and not checked:
        raise RuntimeError("this Python cannot keep an archive inside a folder; 3.10.12, 3.11.4 and newer ones can")
    before = getattr(tarfile.TarFile, "extraction_filter", None)
    tarfile.TarFile.extraction_filter = staticmethod(safe) if safe else None
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def fetch_set(key: str, root: Path) -> str:
    """Downloads one set into ``root`` and says so. A half-done download is never mistaken for a set.

    An archive with a member that would be written elsewhere is refused. What torchvision downloads and unpacks goes to
    ``<root>/.fetching/<key>`` first. After an interruption, archives are kept where their checksum tells whether they
    are whole, and unpacked afresh. Raises whatever the download raises.
    """
    spec, staging = KNOWN[key], root / ".fetching" / key
    missing = find_published(key, root).missing if root.is_dir() else spec.needs
    if not missing:
        open_source(key, "test", root)  # raises ValueError for a damaged one
        return "there already"
    if (root / spec.folder).exists():
        raise FileExistsError(f"{root / spec.folder} is there but lacks {', '.join(missing)}; move it away")
    if key != "tinyImageNet" and spec.torchvision in (None, "StanfordCars"):
        raise RuntimeError("cannot be downloaded by program")
    checked = key not in _NO_CHECKSUM
    socket.setdefaulttimeout(_PATIENCE)  # torchvision's downloads would wait for a silent server for ever
    gdown.download = partial(_DRIVE, timeout=_PATIENCE)  # so would those from a drive, which it takes from there
    _clear(staging, but_for=_ARCHIVES if checked else ())
    with _members_stay_inside(checked or spec.source.endswith(".zip")):
        if key == "tinyImageNet":
            torchvision().datasets.utils.download_and_extract_archive(spec.source, str(staging))
        else:
            getattr(torchvision().datasets, spec.torchvision)(str(staging), download=True, **spec.test)
    (staging / spec.folder).rename(root / spec.folder)
    shutil.rmtree(staging)
    return "fetched"


def fetch_missing(keys: list[str], root: str | Path | None) -> None:
    """Fetches those of the published sets that are not there, saying first what that is; fills ``SAMPLES_ROOT``.

    Raises ValueError, in one line, for the first that cannot be had.
    """
    if root is None:  # the mini-world
        return
    root = existing_root(root)
    there = list_datasets(root)
    missing = [key for key in keys if key in KNOWN and key not in there]
    if sizes := {key: KNOWN[key].gigabytes for key in missing}:
        listed = ", ".join(f"{key} {size:g} GB" for key, size in sizes.items())
        print(f"to download into {root}: {listed}; {sum(sizes.values()):.1f} GB in all", flush=True)
    for key in missing + (["samples"] if root == resolve(SAMPLES_ROOT) and not there else []):
        try:
            done = fetch_set(key, root) if key in KNOWN else copy_samples(root)
        except Exception as error:  # whatever a server answers
            reason = " ".join(str(error).split()) or type(error).__name__
            told = [f"image set {key!r} cannot be fetched: {reason}", *by_hand(key, root)]
            raise ValueError("; ".join(told)) from None
        print(f"{key}: {done}", flush=True)


def copy_samples(folder: Path) -> str:
    """Puts the photographs of ``SAMPLES`` into class folders of a folder that is empty or not there, and says so."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise RuntimeError("scikit-image, which has its photographs, is not installed: pip install scikit-image")
    staging = folder.with_name(f".{folder.name}")
    for name, file in SAMPLES.items():
        (staging / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(package.origin).parent / "data" / file, staging / name)
    staging.rename(folder)
    return f"{len(SAMPLES)} photographs are in {folder}"


def _clear(folder: Path, but_for: tuple[str, ...]) -> None:
    """Empties a folder, which is made if need be, but for files with these suffixes."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folder they are in
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.suffix not in but_for:
            path.unlink()


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for names that cannot be shown
    root, check = resolve(options.root), options.action == "check"
    root = existing_root(root) if root.is_dir() else root
    own = list_datasets(root) if check and root.is_dir() else []
    known = list(dict.fromkeys([*KNOWN, *own]))
    unknown = [key for key in options.keys if key not in known]
    if unknown or (check and not root.is_dir()):
        no_set = f"set {unknown[0]!r} is unknown; there are: {', '.join(known)}" if unknown else ""
        print(f"error: {no_set or f'there is no folder {root}'}", file=sys.stderr)
        return 2
    print(f"data root: {root}")
    keys = options.keys or {"check": own, "list": list(KNOWN), "fetch": list(DATASETS)}[options.action]
    if options.action == "list":
        sets, problems = list_sets(root, keys)
        print(sets.to_string(), *problems, sep="\n")
        total = sum(KNOWN[key].gigabytes for key in keys)
        print(f"{total:.0f} GB to download in all; once unpacked they take about as much again")
        if not options.keys:
            print(f"not among the 16, and measured where they are named only: {', '.join(FURTHER)}")
        return 0
    failed = []
    for key in keys:
        try:
            failed += [] if _check_or_fetch(key, root, check, options.all) else [key]
        except KeyboardInterrupt:
            print(f"\n{key}: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
    if check:
        absent = [key for key in DATASETS if not find_published(key, root).top]
        print(f"{len(keys) - len(failed)} of {len(keys)} sets are readable; not there: {', '.join(absent) or 'none'}")
    if failed:
        print(f"error: {options.action} failed for {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or not keys else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tgazsr_utils.datasets", description=__doc__)
    parser.add_argument("action", choices=("list", "check", "fetch"))
    parser.add_argument("keys", nargs="*", help="sets (default: all; for check, those that are there)")
    parser.add_argument("--root", default=DEFAULT_ROOT, help=f"folder of the sets (default: {DEFAULT_ROOT})")
    parser.add_argument("--all", action="store_true", help="check: decode every image, not one of each class")
    return parser.parse_intermixed_args(arguments)


def _check_or_fetch(key: str, root: Path, check: bool, every_image: bool) -> bool:
    """Prints what came of one set; did it go well?"""
    try:
        if check:
            good, lines = check_set(key, root, every_image)
        else:
            print(f"{key}: {KNOWN[key].gigabytes:g} GB, {KNOWN[key].licence}", flush=True)
            good, lines = True, [fetch_set(key, root)]
    except Exception as error:  # one failing set must not stop the others, whatever a server answers
        good, lines = False, [f"failed: {' '.join(str(error).split())}", *by_hand(key, root)]
    print(f"{key}: " + "\n    ".join(lines), flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
