"""``runs/<name>/index.html``: what a run found, on one page; and its leaderboard for papers and README files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment
from PIL import Image

from tgazsr_utils.durable.files import write_atomic
from tgazsr_utils.measuring.answers import headed
from tgazsr_utils.measuring.tables import readable
from tgazsr_utils.paths import ROOT

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_LATEX = {"\u00a0±\u00a0": r" $\pm$ ", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$"}


def write(folder: Path, about: Mapping[str, Any], books: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the page, and the leaderboard as LaTeX and Markdown, of what is there.

    ``about``: description, when and where it ran ("about"), packages, commit. ``books``: a mapping a notebook: name,
    title, question, state, error, parameters, and which of them are ``changed``.
    """
    found = [{**book, **_left_by(book["name"], folder)} for book in books]
    board, files = _leaderboard(folder)
    shown = {"name": folder.name, "books": found, "board": board, "board_files": files, **about}
    shown |= {"figures": _figures(folder), "pages": _pages(folder), "citation": citation(folder.name, about, books)}
    html = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8")).render(shown)
    return write_atomic(folder / "index.html", lambda path: path.write_text(html, encoding="utf-8"))


def answer_path(folder: Path, notebook: str) -> Path:
    """Where a notebook leaves the sentence that answers its question."""
    return folder / "answers" / f"{notebook}.txt"


def answer_of(folder: Path, notebook: str) -> str:
    """That sentence, or nothing."""
    path = answer_path(folder, notebook)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _left_by(notebook: str, folder: Path) -> dict[str, str]:
    there = {"html": f"html/{notebook}.html", "notebook": f"notebooks/{notebook}.ipynb"}
    answer = answer_of(folder, notebook)
    links = {name: path for name, path in there.items() if (folder / path).is_file()}
    return links | {"answer": answer, "verdict": answer.partition(":")[0].lower()}


def _figures(folder: Path) -> list[dict[str, Any]]:
    """Each with the words that its file keeps."""
    found = []
    for path in sorted(folder.glob("figures/[!.]*.png")):
        with Image.open(path) as image:
            words, (width, height) = image.info, image.size
        title = words.get("Title") or _in_words(path)
        vector = path.with_suffix(".svg")
        large = f"figures/{vector.name if vector.exists() else path.name}"
        alt = words.get("Description") or title
        about = {"title": title, "alt": alt, "wide": width > 2 * height}
        found.append({"path": f"figures/{path.name}", "large": large} | about)
    return found


def _pages(folder: Path) -> list[dict[str, str]]:
    found = sorted(folder.glob("figures/[!.]*.html"))
    return [{"path": f"figures/{path.name}", "title": _in_words(path)} for path in found]


def _in_words(path: Path) -> str:
    return path.stem.replace("_", " ")


def _leaderboard(folder: Path) -> tuple[str, list[str]]:
    """As HTML, and the files that it is in; nothing where there is none."""
    source = folder / "tables" / "leaderboard.csv"
    if not source.is_file():
        return "", []
    table = headed(readable(pd.read_csv(source, index_col="method")))
    for name, text in (("leaderboard.md", as_markdown(table)), ("leaderboard.tex", as_latex(table))):
        write_atomic(source.with_name(name), lambda path, text=text: path.write_text(text, encoding="utf-8"))
    files = [f"tables/leaderboard.{end}" for end in ("csv", "md", "tex")]
    return table.rename_axis(None).rename_axis("method", axis=1).to_html(border=0), files


def as_markdown(table: pd.DataFrame) -> str:
    rows = [[table.index.name or "", *table.columns], ["---", *["---:"] * table.shape[1]]]
    rows += [[name, *row] for name, row in zip(table.index, table.astype(str).to_numpy())]
    return "".join("| " + " | ".join(str(part).replace("|", r"\|") for part in row) + " |\n" for row in rows)


def as_latex(table: pd.DataFrame) -> str:
    """For LaTeX with the package booktabs."""
    text = table.rename_axis(None).to_latex(escape=True, column_format="l" + "r" * table.shape[1])
    for sign, command in _LATEX.items():
        text = text.replace(sign, command)
    return text


def bibtex(cited: Mapping[str, Any], **more: str) -> str:
    """Of what CITATION.cff has: the software itself, or its preferred citation."""
    kind = {"conference-paper": "inproceedings", "software": "software"}[cited["type"]]
    people = [
        f"{one['family-names']}, {one['given-names']}" if "given-names" in one else f"{{{one['name']}}}"
        for one in cited["authors"]
    ]
    fields = {"title": f"{{{cited['title']}}}", "author": " and ".join(people)}
    fields |= {"booktitle": cited.get("collection-title"), "volume": cited.get("volume")}
    fields |= {"year": cited.get("year") or str(cited["date-released"])[:4]}
    fields |= {"version": cited.get("version"), "url": cited.get("url"), **more}
    key = (cited["authors"][0].get("family-names") or "tgazsr-workbook").lower() + str(fields["year"])
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return f"@{kind}{{{key},\n" + ",\n".join(lines) + "\n}\n"


def citation(name: str, about: Mapping[str, Any], books: Sequence[Mapping[str, Any]]) -> str:
    """What to cite, and the settings that are not the notebooks' own."""
    path, parts = ROOT / "CITATION.cff", []
    if path.is_file():
        cited = yaml.safe_load(path.read_text(encoding="utf-8"))
        commit = {"note": f"commit {about['commit']}"} if about.get("commit") else {}
        parts = [bibtex(cited["preferred-citation"]), bibtex(cited, **commit)]
    settings = [f"run {name}: {about['about']}"]
    for book in books:
        own = ", ".join(f"{key} = {book['parameters'].get(key)!r}" for key in book["changed"])
        settings.append(f"{book['name']}: {own or 'its own parameters'}")
    return "\n".join([*parts, *settings]) + "\n"
