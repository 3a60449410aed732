"""What JupyterLab opens at: ``runs/start.md``: each notebook's question and minutes, and the last run's answers."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

# Of this JupyterLab alone, where the person's own settings say nothing: documents are shown as they are read, and
# nobody is asked about news.
_SETTINGS = {
    "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


def title_and_question(first: str) -> tuple[str, str]:
    """Of the text of a notebook's first cell."""
    title = first.split("\n")[0].lstrip("# ")
    question = re.search(r"\*\*Question[.:]?\*\*[.:]?\s*(.+)", first)
    return title, question[1] if question else title


def write(root: Path, notebooks: Path) -> Path:
    """Writes the page of the workbook at ``root``."""
    runs = sorted(_runs(root / "runs"), key=lambda run: run[0], reverse=True)
    lines = [
        "# TGA-ZSR workbook\n",
        "Open a notebook, run all its cells (Run, Run All Cells), and read its last one.\n",
    ]
    lines += ["| notebook | question | minutes |", "|---|---|---|"]
    for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        title, question = _head(path)
        minutes = next(filter(None, (_minutes(books, path.stem) for _, _, books in runs)), None) or _usual(path)
        took = "" if minutes is None else f"{minutes:.1f}"
        lines.append(f"| [{title}](../notebooks/{quote(path.name)}) | {question} | {took} |")
    lines += [*_last_run(*runs[0][1:])] if runs else ["\nNothing has run yet: `./run_all.sh` runs them all."]
    lines.append(
        "\n[README](../README.md) · [running it](../docs/running.md) · [your own method](../docs/own_method.md)"
    )
    page = root / "runs" / "start.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page


def settings(root: Path, usual: Path) -> Path:
    """A folder of JupyterLab's defaults for this workbook: the ``usual`` ones of the environment, and our own."""
    folder = root / "runs" / ".lab"
    folder.mkdir(parents=True, exist_ok=True)
    if usual.is_dir():
        shutil.copytree(usual, folder, dirs_exist_ok=True)
    known, path = {}, folder / "overrides.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(known | _SETTINGS, indent=1), encoding="utf-8")
    return folder


def _runs(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """When the last notebook of each run started, its folder, and its notebooks by the manifest."""
    for path in folder.glob("*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged one
            books = json.loads(path.read_bytes())["notebooks"]
            yield max(str(entry.get("started", "")) for entry in books.values()), path.parent, books


def _head(path: Path) -> tuple[str, str]:
    try:
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        title, question = title_and_question("".join(first["source"]))
    except (OSError, ValueError, LookupError, TypeError):
        title, question = path.stem, ""
    return title.replace("|", r"\|"), question.replace("|", r"\|")


def _minutes(books: dict[str, Any], name: str) -> float | None:
    entry = books.get(name, {})
    return entry["seconds"] / 60 if entry.get("status") == "finished" and "seconds" in entry else None


def _usual(path: Path) -> float | None:
    profile = path.parent / "profiles" / "mini.yaml"
    return yaml.safe_load(profile.read_text(encoding="utf-8")).get("minutes", {}).get(path.stem)


def _last_run(folder: Path, books: dict[str, Any]) -> Iterator[str]:
    where = quote(os.path.basename(folder))
    yield f"\n## The last run: {folder.name}\n"
    for name in sorted(books):
        answer = books[name].get("error") or "no sentence"
        with contextlib.suppress(OSError):
            answer = (folder / "answers" / f"{name}.txt").read_text(encoding="utf-8").strip()
        yield f"- [{name}]({where}/notebooks/{quote(name)}.ipynb): {answer}"
    with contextlib.suppress(OSError):
        yield "\n" + (folder / "tables" / "leaderboard.md").read_text(encoding="utf-8")
    yield f"\nWith all figures, for a browser: `{folder / 'index.html'}`"
