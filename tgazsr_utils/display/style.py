"""How all figures look, what each is called, and how they are kept: one place for colours, markers and small print."""

import base64
import functools
import html
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from tgazsr_utils.measuring.recorded_sweep import KINDS
from tgazsr_utils.runtime.files import write_atomic

DPI = 300
# Without formulas: a class name may hold dollars.
_RC = {"figure.dpi": 100, "svg.hashsalt": "tgazsr", "text.parse_math": False, "legend.title_fontsize": 10}
matplotlib.rcdefaults()  # also where it was imported before, or the working folder has a matplotlibrc
sns.set_theme(style="whitegrid", palette="colorblind", rc=_RC)


class Look(NamedTuple):
    """How a method is drawn, in every figure."""

    color: str
    marker: str
    line: str = "-"


# Families share a colour; each row of the published table has a marker of its own, for print in grey.
LOOKS = {
    "CLIP": Look("#000000", "o", ":"),
    "TGA-ZSR": Look("#D55E00", "D"),
    "Comp-TGA": Look("#D55E00", "X", "--"),
    "TeCoA": Look("#0072B2", "s", "--"),
    "FARE": Look("#117733", "^", "-."),
    "FARE-RobustVLM": Look("#117733", "H", "--"),
    "Sim-CLIP": Look("#117733", "d", ":"),
    "PMG-AFT": Look("#CF6FA3", "P", "-."),
    "PMG-AFT-scaled": Look("#CF6FA3", "p", ":"),
    "FT-Clean": Look("#332288", "v", ":"),
    "FT-Adv.": Look("#332288", "<", "--"),
    "Vision-based": Look("#882255", ">", "-."),
    "Vision-based-grad": Look("#882255", "h", "--"),
    "UCAT": Look("#2A8C8C", "8", "-."),
    "AGFT": Look("#2A8C8C", "P", "--"),
    "SAFT": Look("#8C6D6D", "D", ":"),
    "AdvFLYP": Look("#8C6D6D", "o", "--"),
}
_ALIASES = {"original": "CLIP", "tuned": "TGA-ZSR"}
_FREE_COLORS = ("#8822FF", "#6E2C00", "#E0408A")
_FREE_MARKERS = ("*", "^", "s", "v", "P", "o", "<", ">")  # told apart at the size of a point
PUBLISHED = {  # hollow, in a grey a source
    "paper": {"facecolors": "none", "edgecolors": "0.2", "linewidths": 1.5},
    "UCAT": {"facecolors": "none", "edgecolors": "0.55", "linewidths": 1.5},
}


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Name -> how it is drawn: the workbook's methods as ever; others, sorted by name, as the next free pair.

    "TGA-ZSR, Beta 0.009" and "TGA-ZSR w=0.5" keep their method's colour and get a marker of their own.
    """
    names = dict.fromkeys(names)
    found = {name: LOOKS[_ALIASES.get(name, name)] for name in names if _ALIASES.get(name, name) in LOOKS}
    taken = {look[:2] for look in LOOKS.values()}
    for number, name in enumerate(sorted(names.keys() - found.keys())):
        family = LOOKS.get(re.split(r", | w=", name)[0])
        color = family.color if family else _FREE_COLORS[number % len(_FREE_COLORS)]
        free = [marker for marker in _FREE_MARKERS if (color, marker) not in taken] or _FREE_MARKERS
        found[name] = Look(color, free[number % len(free)], (":", "--", "-.")[number % 3])
    return {name: found[name] for name in names}


def signed(value: float, digits: int = 1) -> str:
    """With its sign; nothing that rounds to zero has one, and what is missing is a dash."""
    if np.isnan(value):
        return "–"
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def or_dash(value: float, digits: int = 1) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def within(value: float, half: float, digits: int = 1) -> str:
    """A value with half its interval, if it has one."""
    return or_dash(value, digits) + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def of_each(table: pd.DataFrame) -> str:
    """ "Method: robust 44.1 ± 2.0 %, clean ..." of a table with intervals."""
    kinds = [kind for kind in KINDS if kind in table]
    told = [
        ", ".join(f"{kind} {within(row[kind], row[f'{kind}_ci'])} %" for kind in kinds) for _, row in table.iterrows()
    ]
    names = [name if isinstance(name, str) else ", ".join(map(str, np.atleast_1d(name))) for name in table.index]
    return "; ".join(f"{name}: {words}" for name, words in zip(names, told))


def headed(figure: Figure, question: str, settings: str = "", numbers: str = "") -> Figure:
    """A question above, ``settings`` in small print below; both and the main ``numbers`` are the alternative text."""
    figure.suptitle(_wrapped(question, figure, 10.5), fontsize=13)
    if settings:
        figure.supxlabel(_wrapped(settings, figure, 16), x=0.01, ha="left", fontsize=8.5, color="0.3")
    figure.set_label(". ".join(part.rstrip(".") for part in (question, settings, numbers) if part).replace("?.", "?"))
    return figure


def _wrapped(text: str, figure: Figure, letters_an_inch: float) -> str:
    whole = re.sub(r"(?<=\d) (?=%)|(?<=±) | (?=±)", "\u00a0", text)  # no line ends between a number and its unit
    return textwrap.fill(whole, max(30, int(letters_an_inch * figure.get_figwidth())), break_on_hyphens=False)


@dataclass(frozen=True)
class Picture:
    """A figure that is kept, as a notebook shows it: the vector one, with its alternative text."""

    svg: str
    alt: str

    def __repr__(self) -> str:
        return self.alt

    def _repr_html_(self) -> str:
        source = base64.b64encode(self.svg.encode()).decode()
        alt = html.escape(self.alt)
        return f'<img alt="{alt}" style="max-width: 100%" src="data:image/svg+xml;base64,{source}">'


Draw = TypeVar("Draw", bound=Callable[..., Figure])


def drawn(draw: Draw) -> Draw:
    """Has a figure that cannot be drawn say so in its place: nothing that was measured is lost for it."""

    @functools.wraps(draw)
    def safe(*args: Any, **named: Any) -> Figure:
        others = plt.get_fignums()
        try:
            return draw(*args, **named)
        except Exception as error:
            for number in set(plt.get_fignums()) - set(others):
                plt.close(number)
            return _undrawn(draw.__name__, error)

    return safe


def _undrawn(name: str, error: Exception) -> Figure:
    """A figure of why there is none."""
    problem = f"{name} could not be drawn: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(problem, file=sys.stderr, flush=True)
    figure = plt.figure(figsize=(6.5, 1.5))
    figure.text(0.02, 0.5, _wrapped(problem, figure, 12), va="center")
    figure.set_label(problem)
    return figure


def save(figure: Figure, folder: Path, name: str) -> Picture:
    """Writes ``<folder>/figures/<name>.png`` and ``.svg``, which say what they show, too; closes the figure."""
    try:
        files = _rendered(figure, name)
    except Exception as error:
        plt.close(figure)
        figure = _undrawn(name, error)
        files = _rendered(figure, name)
    plt.close(figure)
    for suffix, content in files.items():
        path = folder / "figures" / f"{name}.{suffix}"
        write_atomic(path, lambda temporary, content=content: Path(temporary).write_bytes(content))
    return Picture(files["svg"].decode(), figure.get_label())


def _rendered(figure: Figure, name: str) -> dict[str, bytes]:
    title, alt = " ".join(figure.get_suptitle().split()), figure.get_label()
    about = {"Title": title or name, "Description": alt}
    files = {}
    for suffix, metadata in (("png", about), ("svg", about | {"Date": None})):
        file = io.BytesIO()
        figure.savefig(file, format=suffix, dpi=DPI, bbox_inches="tight", metadata=metadata)
        files[suffix] = file.getvalue()
        figure.set_layout_engine("none")  # laid out once, for both: that takes as long as drawing
    described = f"</title>\n <desc>{html.escape(alt, quote=False)}</desc>"
    files["svg"] = files["svg"].replace(b"</title>", described.encode(), 1)
    return files
