"""``python -m tgazsr_utils.datasets``: lists, checks and fetches the published sets."""

import argparse
import shutil
import socket
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
import torchvision.datasets
from torchvision.datasets.utils import download_and_extract_archive

from tgazsr_utils.datasets.layouts import is_there, list_datasets, missing_parts
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.datasets.published_sets import DATASETS, DEFAULT_ROOT, DatasetSpec
from tgazsr_utils.paths import resolve
from tgazsr_utils.progress import progress

_ARCHIVES = (".zip", ".tgz", ".gz", ".tar")
_NO_CHECKSUM = {"tinyImageNet", "fgvc_aircraft"}  # half an archive of these cannot be told from a whole one


def list_sets(root: Path) -> pd.DataFrame:
    """One row a published set: what it holds, what it costs to download, whether it is below ``root``."""
    rows = {
        key: {
            "images": spec.images,
            "classes": spec.classes,
            "split": spec.split,
            "size": f"{spec.gigabytes:g} GB",
            "there": _state(key, root),
            "licence": spec.licence,
        }
        for key, spec in DATASETS.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _state(key: str, root: Path) -> str:
    if not is_there(key, root):
        return "no"
    return "yes" if (root / key).is_dir() or not missing_parts(key, root) else "incomplete"


def check_set(key: str, root: Path, every_image: bool = False) -> tuple[bool, list[str]]:
    """Reads a set's lists and one image of each class, or all images; (is it readable, lines that say what was found).

    Of a published set this is the part to test on, of class folders of one's own all of it.
    """
    spec = DATASETS.get(key)
    options = {"image_size": 8, "on_bad_image": "leave_out", "decode": False}
    try:
        parts = [load_dataset(key, split, root, **options) for split in (("test",) if spec else ("train", "test"))]
    except ValueError as error:
        return False, [str(error), *(by_hand(spec, root) if spec else [])]
    data = parts[0]
    found = f"{sum(map(len, parts)):,} images, {len(data.class_names)} classes"
    lines = [f"as published: {found}" if data.published else found]
    if spec and not data.published:
        lines = [f"usable, but not the published set: {found} instead of {spec.images:,} and {spec.classes}"]
    lines.append("prompts: " + "; ".join(_some(data.prompts)))
    if repeated := len(data.prompts) - len(set(data.prompts)):
        lines.append(f"{repeated} prompts are the same as another class's")
    chosen = [range(len(part)) if every_image else _one_of_each_class(part.labels) for part in parts]
    total, bad = sum(map(len, chosen)), 0
    with progress(total=total, desc=f"decode {key}", unit="image", leave=False) as bar:
        for part, rows in zip(parts, chosen):
            for batch in part.batches(torch.tensor(list(rows)).split(64)):
                bar.update(len(batch.rows))
            bad += len(part.images.unreadable)
    lines.append(f"{total - bad:,} of {total:,} images decoded{'' if every_image else ', one of each class'}")
    return not bad, lines


def _one_of_each_class(labels: torch.Tensor) -> list[int]:
    """Rows of the first image of each class among ``labels`` ``[N]``."""
    first = {label: row for row, label in reversed(list(enumerate(labels.tolist())))}
    return sorted(first.values())


def _some(prompts: Sequence[str], n: int = 3) -> list[str]:
    return [*prompts] if len(prompts) <= n + 1 else [*prompts[:n], "...", prompts[-1]]


def by_hand(spec: DatasetSpec, root: Path) -> list[str]:
    """Where to get a set when it cannot be downloaded by program, and where to put it."""
    what = spec.by_hand or "unpack what is offered there"
    return [f"source: {spec.source}", f"by hand: in {root}, {what}; looked for: {', '.join(spec.needs)}"]


@contextmanager
def _members_stay_inside(checked: bool) -> Iterator[None]:
    """Within, tar archives cannot write elsewhere (zipfile sees to that itself).

    A Python that is too old for that unpacks only archives whose checksum is ``checked``.
    """
    if not hasattr(tarfile, "data_filter"):
        if not checked:
            raise RuntimeError("this Python cannot keep an archive inside a folder; 3.10.12, 3.11.4 and newer ones can")
        yield
        return
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def fetch_set(key: str, root: Path) -> str:
    """Downloads one set into ``root`` and says so. A half-done download is never mistaken for a set; an archive with a member
    that would be written elsewhere is refused.

    What torchvision downloads and unpacks goes to ``<root>/.fetching/<key>`` first. After an interruption, archives are
    kept where their checksum tells whether they are whole, and unpacked afresh. Raises whatever the download raises.
    """
    spec = DATASETS[key]
    if not missing_parts(key, root):
        return "there already"
    if (root / spec.folder).exists():
        raise FileExistsError(
            f"{root / spec.folder} is there but lacks {', '.join(missing_parts(key, root))}; move it away"
        )
    if key != "tinyImageNet" and spec.torchvision in (None, "StanfordCars"):
        raise RuntimeError("cannot be downloaded by program")
    staging = root / ".fetching" / key
    if key in _NO_CHECKSUM:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.rglob("*"), reverse=True):  # files before the folder they are in
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.suffix not in _ARCHIVES:
            path.unlink()
    with _members_stay_inside(checked=key not in _NO_CHECKSUM):
        if key == "tinyImageNet":
            download_and_extract_archive(spec.source, str(staging))
        else:
            getattr(torchvision.datasets, spec.torchvision)(str(staging), download=True, **spec.test)
    (staging / spec.folder).rename(root / spec.folder)
    shutil.rmtree(staging)
    return "fetched"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tgazsr_utils.datasets", description=__doc__)
    parser.add_argument("action", choices=("list", "check", "fetch"))
    parser.add_argument("keys", nargs="*", help="sets (default: all; for check, those that are there)")
    parser.add_argument("--root", default=DEFAULT_ROOT, help=f"folder of the sets (default: {DEFAULT_ROOT})")
    parser.add_argument("--all", action="store_true", help="check: decode every image, not one of each class")
    options = parser.parse_args(arguments)
    root = resolve(options.root)
    own = [] if options.action != "check" or not root.is_dir() else list_datasets(root)
    unknown = [key for key in options.keys if key not in DATASETS and key not in own]
    if unknown:
        print(
            f"error: set {unknown[0]!r} is unknown; there are: {', '.join(dict.fromkeys([*DATASETS, *own]))}",
            file=sys.stderr,
        )
        return 2
    if options.action == "check" and not root.is_dir():
        print(f"error: there is no folder {root}", file=sys.stderr)
        return 2
    keys = options.keys or list(DATASETS)
    print(f"data root: {root}")
    if options.action == "list":
        print(list_sets(root).loc[keys].to_string())
        total = sum(DATASETS[key].gigabytes for key in keys)
        print(f"{total:.0f} GB to download in all; once unpacked they take about as much again")
        return 0
    socket.setdefaulttimeout(60)  # torchvision's downloads would wait for a silent server for ever
    if options.action == "check" and not options.keys:
        keys = own
    failed = []
    for key in keys:
        try:
            if options.action == "check":
                good, lines = check_set(key, root, options.all)
            else:
                print(f"{key}: {DATASETS[key].gigabytes:g} GB, {DATASETS[key].licence}", flush=True)
                good, lines = True, [fetch_set(key, root)]
        except KeyboardInterrupt:
            print(f"\n{key}: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        except Exception as error:  # one failing set must not stop the others, whatever a server answers
            good, lines = False, [f"failed: {' '.join(str(error).split())}"]
            lines += by_hand(DATASETS[key], root) if key in DATASETS else []
        print(f"{key}: " + "\n    ".join(lines), flush=True)
        failed += [] if good else [key]
    if options.action == "check":
        absent = [key for key in DATASETS if not is_there(key, root)]
        print(f"{len(keys) - len(failed)} of {len(keys)} sets are readable; not there: {', '.join(absent) or 'none'}")
    if failed:
        print(f"error: {options.action} failed for {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or (options.action == "check" and not keys) else 0


if __name__ == "__main__":
    sys.exit(main())
