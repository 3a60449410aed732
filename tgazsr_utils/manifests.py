"""What runs have left: what is done, what would run and how long it took, what differs between two of them."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tgazsr_utils.core.objectives import PRESET
from tgazsr_utils.display.report import answer_of
from tgazsr_utils.display.report import write as write_report
from tgazsr_utils.listing import WIDTH, paragraph, question_of, title_of
from tgazsr_utils.machine import cpu_name
from tgazsr_utils.measuring.answers import headed
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import compare, readable
from tgazsr_utils.parameters import SettingsError
from tgazsr_utils.paths import ROOT, resolve
from tgazsr_utils.profiles import default_parameters, shown
from tgazsr_utils.runtime.devices import device_name
from tgazsr_utils.runtime.fingerprints import code_version
from tgazsr_utils.runtime.runs import Run


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


def show_plan(
    plan: Sequence[tuple[str, str | None]],
    parameters: Mapping[str, Mapping[str, Any]],
    earlier: Mapping[Path, Mapping[str, Any]],
    usual: Mapping[str, float],
    will: str = "would run",
) -> dict[str, float | None]:
    """Prints why each notebook would run, and how long it took: in this folder (the first), or last in others.

    ``usual``: the profile's minutes. Gives the minutes of each that would run. A run with these ``parameters`` goes
    before one with others, of which it is said what they were.
    """
    found: dict[str, float | None] = {}
    for name, why in plan:
        if why is None:
            print(paragraph(name, "done already"))
        else:
            found[name], took = _minutes(name, parameters[name], earlier, usual)
            print(paragraph(name, f"{will}, as {why}; {took}"))
    known = [minutes for minutes in found.values() if minutes is not None]
    without = f"{len(found) - len(known)} of these have" if len(found) - len(known) > 1 else "one of these has"
    if known:
        print(f"{sum(known):.1f} minutes in all" + ("" if len(known) == len(found) else f", but {without} no time yet"))
    return found


def _minutes(
    name: str, parameters: Mapping[str, Any], earlier: Mapping[Path, Mapping[str, Any]], usual: Mapping[str, float]
) -> tuple[float | None, str]:
    """What a notebook is likely to take, and whence that is known."""
    ended = [(f, books[name]) for f, books in earlier.items() if books.get(name, {}).get("status") == "finished"]
    if ended:
        here, wanted = next(iter(earlier)), {**parameters, "output": None}
        other = lambda entry: sorted(key for key, value in wanted.items() if _of(entry).get(key) != value)
        best = lambda run: (not other(run[1]), run[0] == here, str(run[1].get("started")))
        folder, entry = max(ended, key=best)
        minutes, changed = entry.get("seconds", 0) / 60, other(entry)
        took = f"{minutes:.1f} minutes on {str(entry.get('started'))[:10]} in {shown(folder)}"
        return minutes, took + (f", with other {', '.join(changed)}" if changed else "")
    if name in usual:
        return usual[name], f"about {usual[name]:g} minute{'' if usual[name] == 1 else 's'} on two CPU cores"
    return None, "no earlier time"


def _of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A run's parameters, wherever it went."""
    return entry.get("parameters", {}) | {"output": None}


def show_store(run: Run, methods: Iterable[str]) -> None:
    """Prints what may be there already; whether it fits is only known once models and image sets are loaded."""
    models = [path.stem for path in run.stored_models.glob("*.safetensors")]
    named = lambda method, stem: re.fullmatch(rf"{re.escape(method)}_seed\d+_\w+", stem) is not None
    counted = ", ".join(f"{method} {sum(named(method, stem) for stem in models)}" for method in methods)
    records = len(list(run.stored_records.glob("*.json")))
    held = f"{len(models)} models{counted and f' ({counted})'} and {records} records of any settings"
    sentence = f"{shown(run.store)} holds {held}; what fits is not made again"
    print(textwrap.fill(sentence, WIDTH, break_on_hyphens=False))


def compare_runs(first: str, second: str) -> int:
    """Prints what differs in the parameters of two runs, and the paired differences of the methods both have."""
    folders = [resolve(name) for name in (first, second)]
    for folder in folders:
        if not (folder / "manifest.json").exists():
            raise SettingsError(f"{folder} is not the folder of a run (it has no manifest.json)")
    entries = [load_manifest(folder / "manifest.json")["notebooks"] for folder in folders]
    for notebook in sorted(set(entries[0]) & set(entries[1])):
        a, b = (_of(entry[notebook]) for entry in entries)
        for name in sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)):
            one, other = (_in_words(name, of.get(name)) for of in (a, b))
            print(f"{notebook}: {name} is {one} in {first}, {other} in {second}")
    kept = [{path.stem: path for path in folder.glob("records/*.jsonl")} for folder in folders]
    both = sorted(set(kept[0]) & set(kept[1]))
    if not both:
        print("no notebook has left records in both")
    for name in both[-1:]:
        lines = [paths[name].read_text(encoding="utf-8").splitlines() for paths in kept]
        records = [[Record.model_validate_json(line) for line in part] for part in lines]
        print(f"\n{name}: {first} minus {second}, percentage points [95 % interval over images], on the same images")
        print(compare(*records).to_string())
        methods = [{record.method for record in part} for part in records]
        for folder, only in ((first, methods[0] - methods[1]), (second, methods[1] - methods[0])):
            if only:
                print(f"only in {folder}: {', '.join(sorted(only))}")
    return 0


def _in_words(name: str, value: Any) -> str:
    if value is not None or name not in PRESET:
        return repr(value)
    return f"each method's own (TGA-ZSR: {PRESET[name]})"


def environment_of(device: str) -> dict[str, Any]:
    """What a result may depend on beyond its parameters."""
    packages = {one.metadata["Name"]: one.version for one in metadata.distributions() if one.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "code": code_version(),
        **_git(),
        "note": "other versions, devices or thread counts may change results by rounding",
    }


def _git() -> dict[str, Any]:
    """The commit that the workbook is at, and whether tracked files differ from it; None where git cannot tell."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:  # a wheel's working folder may be in somebody else's repository
        return {"commit": None, "uncommitted": None}
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "uncommitted": None if status is None else bool(status)}


def report(folder: Path, manifest: Mapping[str, Any], description: str) -> None:
    """Writes the run's page with what there is; where that cannot be, says so, as nothing else depends on it."""
    entries = dict(sorted(manifest["notebooks"].items()))
    last = max(entries.values(), key=lambda entry: str(entry.get("started")), default={})
    environment = last.get("environment", {})
    parts = [str(last.get("started", ""))[:10], environment.get("device"), environment.get("cpu")]
    if commit := environment.get("commit"):
        parts.append(f"commit {commit[:12]}" + (" and uncommitted changes" if environment.get("uncommitted") else ""))
    about = {"description": description.strip(), "about": ", ".join(dict.fromkeys(filter(None, parts)))}
    about |= {"packages": environment.get("packages", {}), "commit": commit}
    try:
        write_report(folder, about, [_of_report(name, entry) for name, entry in entries.items()])
    except Exception as error:
        print(f"no report could be made: {' '.join(str(error).split())}", file=sys.stderr)


def _of_report(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A notebook's part of it."""
    parameters, status = entry.get("parameters", {}), str(entry.get("status"))
    own, title, question = {}, name, ""
    with contextlib.suppress(SettingsError, OSError):  # a notebook that is gone, or broken by now
        own, title, question = default_parameters(name), title_of(name), re.sub(r"[*`]", "", question_of(name))
    changed = [key for key in parameters if key != "output" and (key not in own or own[key] != parameters[key])]
    took = f" in {entry['seconds'] / 60:.1f} minutes" if "seconds" in entry else ""
    state = f"{status}{took}" + (f", {str(entry['started'])[:10]}" if "started" in entry else "")
    about = {"name": name, "title": title, "question": question, "parameters": parameters, "changed": changed}
    return about | {"state": state, "error": entry.get("error", "")}


def show(folder: Path, with_table: bool) -> None:
    """Prints the answers, the leaderboard, verdicts if there are any, and where the report and the figures are."""
    for path in sorted(folder.glob("answers/[!.]*.txt")):
        print("\n" + paragraph(path.stem, answer_of(folder, path.stem)))
    board, verdicts = (folder / "tables" / f"{name}.csv" for name in ("leaderboard", "verdicts"))
    if with_table and board.exists():
        print("\n" + headed(readable(pd.read_csv(board, index_col="method"))).to_string())
    if with_table and verdicts.exists() and len(table := pd.read_csv(verdicts, index_col=0)):
        print("\n" + table.to_string(float_format="%.2f", na_rep="-"))
    figures = sorted(path for path in folder.glob("figures/*") if path.suffix in (".png", ".html"))
    print("\nfigures:" if figures else "\nno figures", *(f"\n  {os.path.relpath(p)}" for p in figures), sep="")
    print(f"report: {os.path.relpath(folder / 'index.html')}; notebooks as HTML: {os.path.relpath(folder / 'html')}/")
