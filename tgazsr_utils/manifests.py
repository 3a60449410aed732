"""What runs have left: what is done, what would run and how long it took, what differs between two of them."""

import contextlib
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tgazsr_utils.durable.runs import Run
from tgazsr_utils.listing import WIDTH, paragraph
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import compare
from tgazsr_utils.parameters import SettingsError
from tgazsr_utils.paths import ROOT, resolve
from tgazsr_utils.profiles import shown


def load_manifest(path: Path) -> dict[str, Any]:
    """What ``Batch`` has written. Raises SettingsError for a damaged one."""
    if not path.exists():
        return {"notebooks": {}, "profile": None}
    try:
        read = json.loads(path.read_bytes())
        books = read["notebooks"]
        if not all(isinstance(entry, dict) and isinstance(entry.get("files", {}), dict) for entry in books.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SettingsError(
            f"manifest {path} is damaged; remove it to run the notebooks again, which goes on from what is stored"
        ) from None
    return {"notebooks": books, "profile": read.get("profile")}


def earlier_runs(folder: Path, profile: str) -> dict[Path, dict[str, Any]]:
    """Folder -> the notebooks of its manifest: this one, then others of the same profile."""
    found = {folder: load_manifest(folder / "manifest.json")["notebooks"]}
    for path in {*folder.parent.glob("*/manifest.json"), *(ROOT / "runs").glob("*/manifest.json")}:
        with contextlib.suppress(SettingsError):  # a damaged one
            if path.parent not in found and (other := load_manifest(path))["profile"] == profile:
                found[path.parent] = other["notebooks"]
    return found


def show_plan(plan: Sequence[tuple[str, str | None]], earlier: Mapping[Path, Mapping[str, Any]]) -> None:
    """Prints why each notebook would run, and how long it took: in this folder (the first), or last in others."""
    minutes, unknown, here = 0.0, 0, next(iter(earlier))
    for name, why in plan:
        ended = [(f, books[name]) for f, books in earlier.items() if books.get(name, {}).get("status") == "finished"]
        if why is None:
            print(paragraph(name, "done already"))
        elif ended:
            folder, entry = max(ended, key=lambda run: (run[0] == here, str(run[1].get("started"))))
            minutes += (took := entry.get("seconds", 0) / 60)
            when = str(entry.get("started"))[:10]
            print(paragraph(name, f"would run, as {why}; {took:.1f} minutes on {when} in {shown(folder)}"))
        else:
            unknown += 1
            print(paragraph(name, f"would run, as {why}; no earlier time"))
    print(f"{minutes:.1f} minutes in all by these times" + (f", without {unknown} that have none" if unknown else ""))


def show_store(run: Run, methods: Iterable[str]) -> None:
    """Prints what may be there already; whether it fits is only known once models and image sets are loaded."""
    models = [path.stem for path in run.stored_models.glob("*.safetensors")]
    named = lambda method, stem: re.fullmatch(rf"{re.escape(method)}_seed\d+_\w+", stem) is not None
    counted = ", ".join(f"{method} {sum(named(method, stem) for stem in models)}" for method in methods)
    records = len(list(run.stored_records.glob("*.json")))
    held = f"{len(models)} models{counted and f' ({counted})'} and {records} records of any settings"
    said = f"{shown(run.store)} holds {held}; what fits is not made again"
    print(textwrap.fill(said, WIDTH, break_on_hyphens=False))


def compare_runs(first: str, second: str) -> int:
    """Prints what differs in the parameters of two runs, and the paired differences of the methods both have."""
    folders = [resolve(name) for name in (first, second)]
    for folder in folders:
        if not (folder / "manifest.json").exists():
            raise SettingsError(f"{folder} is not the folder of a run (it has no manifest.json)")
    entries = [load_manifest(folder / "manifest.json")["notebooks"] for folder in folders]
    for notebook in sorted(set(entries[0]) & set(entries[1])):
        a, b = (entry[notebook].get("parameters", {}) | {"output": None} for entry in entries)
        for name in sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)):
            print(f"{notebook}: {name} is {a.get(name)!r} in {first}, {b.get(name)!r} in {second}")
    kept = [{path.stem: path for path in folder.glob("records/*.jsonl")} for folder in folders]
    both = sorted(set(kept[0]) & set(kept[1]))
    if not both:
        print("no notebook has left records in both")
    for name in both[-1:]:
        lines = [paths[name].read_text(encoding="utf-8").splitlines() for paths in kept]
        records = [[Record.model_validate_json(line) for line in part] for part in lines]
        print(f"\n{name}: {first} minus {second}, percentage points [95 % interval over images], on the same images")
        print(compare(*records).to_string())
    return 0
