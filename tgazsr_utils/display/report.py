"""``runs/<name>/index.html``: what a run found, on one page; and its leaderboard for papers and README files."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment
from PIL import Image

from tgazsr_utils.measuring.answers import BASELINE, SUBJECT, UNTUNED, headed
from tgazsr_utils.measuring.published import published
from tgazsr_utils.measuring.tables import readable
from tgazsr_utils.paths import ROOT
from tgazsr_utils.runtime.files import write_atomic

_TEMPLATE = Path(__file__).with_name("report.html.j2")
# A page of the explorer as ``panels.document`` writes it.
_PANEL = re.compile(
    r'.*(?P<style><style>\n\.tga .*</style>)</head>\n<body class="tga"><h1>(?P<title>.*?)</h1>(?P<body>.*)</body>',
    re.DOTALL,
)
# What explains the numbers, for those who read the page where the workbook is.
_EXPLAINED = {
    "README": "README.md",
    "the mini-world over three seeds, and what was found": "data/reference/mini/README.md",
    "what can be relied on": "docs/reliability.md",
}
_LATEX = {"\u00a0±\u00a0": r" $\pm$ ", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "−": "$-$"}


def write(folder: Path, about: Mapping[str, Any], books: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the page, and the leaderboard as LaTeX and Markdown, of what is there.

    ``about``: description, when and where it ran ("about"), packages, commit. ``books``: a mapping a notebook: name,
    title, question, state, error, parameters, and which of them are ``changed``.
    """
    found = [{**book, **_left_by(book["name"], folder)} for book in books]
    board, files = _leaderboard(folder)
    shown = {"name": folder.name, "claim": _claim(), "books": found, "board": board, "board_files": files, **about}
    shown |= {"cards": _cards(folder), "explained": _explained(folder), "citation": citation(folder.name, about, books)}
    html = Environment(autoescape=True).from_string(_TEMPLATE.read_text(encoding="utf-8")).render(shown)
    return write_atomic(folder / "index.html", lambda path: path.write_text(html, encoding="utf-8"))


def _claim() -> str:
    """What the paper says, by its printed means, to hold the answers against."""
    table = published()
    of = lambda name: f"{table.loc[name, ('PGD', 'paper')]:.1f} and {table.loc[name, ('clean', 'paper')]:.1f}"
    given = ", ".join(f"{name} {of(name)}" for name in (SUBJECT, BASELINE, UNTUNED))
    return (
        "The claim: an attack moves CLIP's text-guided attention, and tuning that holds it in place on one set keeps "
        "answers right on others. In percent under PGD-100 at epsilon 1/255 and on clean images, mean of sixteen sets, "
        f"the paper gives {given}."
    )


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


def _cards(folder: Path) -> list[dict[str, Any]]:
    """All figures and pages by name: ``of`` is the notebook's number, ``files`` what there is of each, best first."""
    found = [{**about, "of": about["name"][:2]} for about in (*_figures(folder), *_pages(folder))]
    return sorted(found, key=lambda card: card["name"])


def _figures(folder: Path) -> Iterator[dict[str, Any]]:
    """Each with the words that its file keeps, and its width in pixels as it was drawn."""
    for path in folder.glob("figures/[!.]*.png"):
        with Image.open(path) as image:
            words, width, dpi = image.info, image.size[0], image.info.get("dpi", (100, 100))[0]
        files = [f"figures/{one.name}" for one in (path.with_suffix(".svg"), path) if one.exists()]
        alt = words.get("Description") or words.get("Title") or _in_words(path)
        yield {
            "name": _in_words(path),
            "image": files[-1],
            "files": files,
            "alt": alt,
            "width": round(100 * width / dpi),
        }


def _pages(folder: Path) -> Iterator[dict[str, Any]]:
    """The explorer's panels as last seen: title, style and body. Of other pages, and those with a script, the name."""
    for path in folder.glob("figures/[!.]*.html"):
        text = path.read_text(encoding="utf-8")
        panel = None if "<script" in text else _PANEL.match(text)
        yield {"name": _in_words(path), "files": [f"figures/{path.name}"], **(panel.groupdict() if panel else {})}


def _explained(folder: Path) -> dict[str, str]:
    """Words -> relative link to what explains a run; none where its folder is not within that of the workbook."""
    here, there = folder.resolve(), {words: ROOT / name for words, name in _EXPLAINED.items()}
    if not here.is_relative_to(ROOT) or not all(path.exists() for path in there.values()):
        return {}
    return {words: Path(os.path.relpath(path, here)).as_posix() for words, path in there.items()}


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
