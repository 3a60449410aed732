"""The challenge: who submits a method gives its bits, and anybody can check them and set methods side by side.

``submit`` makes a file of a run's method, ``challenge`` checks files and shows them together. Rows that were printed,
and that nobody can check, are shown as such.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from tgazsr_utils.measuring.published import ATTACKS
from tgazsr_utils.measuring.records import Record, RecordStore
from tgazsr_utils.measuring.submissions import SETS, Submission, attack_of, check, read, write
from tgazsr_utils.measuring.tables import compare, leaderboard, readable
from tgazsr_utils.paths import DATA, ROOT, resolve
from tgazsr_utils.runtime.runs import Run

KEPT = DATA / "challenge"
RECORDS = "records/04_evaluate_16_datasets.jsonl"  # of a run
COLUMNS = ["submitted by", "robust", "clean", "average", "interval", "images", "code", "cost", "status"]


def submit(method: str, by: str, run: str | None = None) -> Path:
    """Writes the file of a run's method into its folder and prints the row; None: the run that measured last.

    Raises ValueError, in one line, for a method that is not there, and for what ``challenge`` would refuse.
    """
    folder = resolve(run) if run else _latest()
    try:
        lines = (folder / RECORDS).read_bytes().splitlines()
        records = [Record.model_validate_json(line) for line in lines]
    except OSError:
        raise ValueError(f"{folder} has no {RECORDS}, which notebook 04 writes") from None
    own = [r for r in records if r.method == method]
    if not own:
        there = ", ".join(dict.fromkeys(r.method for r in records))
        raise ValueError(f"{method!r} is none of the methods of {folder}; there are: {there}")
    settings = [r.settings for r in own]
    checks = sorted(RecordStore(Run(folder).stored_records).checks.all(), key=lambda check: check.time)
    latest = {check.model: check for check in checks if check.settings in settings}
    try:
        of_weights = [latest[model] for model in dict.fromkeys(r.model for r in own) if model in latest]
        submission = Submission(method=method, by=by, checks=of_weights, records=own)
        check(submission)
    except ValueError as error:
        raise ValueError(f"{method} of {folder} cannot be submitted: {_reason(error)}") from None
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", method).strip("_")
    path = write(submission, folder / "challenge" / f"{name}_{own[0].model}.jsonl")
    print(submission.row, f"written to {path}; measuring took {submission.cost}", sep="\n")
    return path


def _latest() -> Path:
    found = sorted((ROOT / "runs").glob(f"*/{RECORDS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("no run below runs/ has records of notebook 04 yet; name the folder of one after the method")
    return found[-1].parents[1]


def challenge(files: Sequence[str] = ()) -> int:
    """Checks files (none: those that are kept) and prints the table of each challenge; 1 if one was refused.

    A file of weights that an earlier one has is no row: it is said how many of their bits differ.
    """
    kept: dict[str, dict[str, Submission]] = {world: {} for world in SETS}
    refused = 0
    for name in files or map(str, sorted(KEPT.glob("*.jsonl"))):
        try:
            _take(name, kept)
        except (ValueError, OSError) as error:
            refused = 1
            print(f"refused: {plain(name)}: {_reason(error)}", file=sys.stderr, flush=True)
    for world, rows in kept.items():
        if rows or (world == "photographs" and not files):
            _show(world, list(rows.values()))
    return refused


def _take(name: str, kept: dict[str, dict[str, Submission]]) -> None:
    """Adds a file to those of its challenge. Raises ValueError, OSError for one that is refused."""
    s = read(resolve(name))
    check(s)
    others = kept[s.world]
    if others:
        _agree(s, *next(iter(others.items())))
    again = [other for other, known in others.items() if known.models.keys() & s.models.keys()]
    if not again:
        others[name] = s
        return
    key = lambda r: (r.model, r.dataset, r.attack)
    theirs = {key(r): r.hits for r in others[again[0]].records}
    both = [r for r in s.records if key(r) in theirs]
    differ = sum(bin(int(r.hits, 16) ^ int(theirs[key(r)], 16)).count("1") for r in both)
    total = sum(r.n for r in both)
    print(f"{plain(name)}: the weights of {plain(again[0])} again; {differ:,} of {total:,} bits differ")


def _agree(s: Submission, name: str, first: Submission) -> None:
    """Raises ValueError for what was not measured on the same images, with the same prompts, under the same attack."""
    if s.protocol != first.protocol:
        raise ValueError(f"it has {s.protocol}; {name} has {first.protocol}")
    theirs = {r.dataset: r for r in first.records}
    for r in s.records:
        for of, what in (("n", "numbers of images"), ("data", "images, labels or prompts"), ("pixels", "pixels")):
            a, b = (getattr(record, of) for record in (r, theirs[r.dataset]))
            if a != b:
                raise ValueError(f"{r.dataset} has other {what} ({a}) than in {name} ({b})")


def _show(world: str, rows: Sequence[Submission]) -> None:
    """Prints the joint table and the paired differences."""
    often = Counter(s.method for s in rows)
    named = {s.method if often[s.method] == 1 else f"{s.method} {min(s.models)}": s for s in rows}
    alike = {name: _alike(s, name) for name, s in named.items()}
    print("", f"{world}: {rows[0].protocol}" if rows else world, sep="\n")
    table = joint(named, alike) if rows else pd.DataFrame()
    if world == "photographs":
        table = pd.concat([table, printed(rows[0].attacked.settings["attack"] if rows else "pgd")])
    print(table.fillna("").to_string())
    if len(rows) > 1:
        print("\npaired differences, percentage points [95 % interval over images], on the same images")
        pairs = combinations([name for name in table.index if name in alike], 2)
        print(pd.concat([_paired(alike, *names) for names in pairs]).to_string())


def _paired(alike: dict[str, list[Record]], a: str, b: str) -> pd.DataFrame:
    return compare(*([r.model_copy(update={"method": f"{a} - {b}"}) for r in alike[name]] for name in (a, b)))


def _alike(s: Submission, name: str) -> list[Record]:
    """Records as one table takes them: seeds by their order; the code has a column of its own."""
    order = {seed: place for place, seed in enumerate(sorted(s.models.values()))}
    of = lambda r: {"seed": order[r.seed], "settings": attack.model_dump() if (attack := attack_of(r)) else {}}
    return [r.model_copy(update={"method": name, "code": ""} | of(r)) for r in s.records]


def joint(named: dict[str, Submission], alike: dict[str, list[Record]]) -> pd.DataFrame:
    """A row a file, best average first, with 95 % intervals."""
    table = readable(leaderboard([r for records in alike.values() for r in records]))
    about = [(s.by, s.records[0].code, s.cost, "checked") for s in (named[name] for name in table.index)]
    table[["submitted by", "code", "cost", "status"]] = about
    return table[COLUMNS]


def printed(attack: str) -> pd.DataFrame:
    """The rows of ``data/published_table.csv`` that have a number under an attack."""
    table = pd.read_csv(DATA / "published_table.csv").set_index("method").dropna(subset=ATTACKS[attack])
    means = table[[ATTACKS[attack], "clean"]].set_axis(["robust", "clean"], axis=1)
    means["average"] = means.mean(axis=1)
    return means.map("{:.2f}".format).assign(**{"submitted by": table.source, "status": "printed, not checked"})


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return plain(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    return plain(error)


def plain(text: object) -> str:
    """One line, not too long, that any terminal takes."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
    return line if len(line) <= 600 else f"{line[:300]} ... {line[-300:]}"
