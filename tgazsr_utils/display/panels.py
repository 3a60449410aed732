"""What the explorer shows, as HTML and SVG: in its widgets, as the output where there are none, and in saved files.

Colours follow JupyterLab's theme where there is one, and the page's own ink elsewhere.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from tgazsr_utils.display.pictures import coloured, pixels
from tgazsr_utils.measuring.attacked_image import AttackedImage
from tgazsr_utils.measuring.loss_mixture import TERMS, TermGradients, cosines, in_words, mixture
from tgazsr_utils.measuring.recorded_sweep import KINDS, grid_position, nearest_measured
from tgazsr_utils.measuring.tried import Outcome

CELL, LEFT, TOP = 62, 62, 26  # pixels: a cell of a heat map, and what is before its first one
WIDEST = 1240  # pixels: a panel
SHIFT_NAMES = {
    "l2": "distance (l2)",
    "cosine": "cosine",
    "iou_top20": "overlap of the top 20 %",
    "centre_move": "centre moved (patches)",
    "energy_clean": "inside object, clean",
    "energy_adv": "inside object, attacked",
    "energy_uniform": "if spread evenly",
}

STYLE = """<style>
.tga { color: var(--jp-ui-font-color1, inherit); font: 13px/1.45 var(--jp-ui-font-family, sans-serif); }
.tga h1 { font-size: 18px; font-weight: normal; }
.tga h3 { font-size: 13px; font-weight: 600; margin: 6px 0 2px; }
.tga p { margin: 4px 0; }
.tga table { border-collapse: collapse; margin: 0; }
.tga td, .tga th { padding: 2px 8px; text-align: right; font-weight: normal; white-space: nowrap; }
.tga th { opacity: 0.75; border-bottom: 1px solid currentColor; vertical-align: bottom; }
.tga td:first-child, .tga th:first-child { text-align: left; }
.tga .sum td { border-top: 1px solid currentColor; font-weight: 600; }
.tga .bar { display: inline-block; width: 72px; height: 10px; text-align: left; background: #8883; }
.tga .bar i { display: block; height: 10px; background: var(--jp-brand-color1, #1976d2); }
.tga .row { display: flex; flex-flow: row wrap; gap: 6px 22px; align-items: flex-start; margin-bottom: 6px; }
.tga .pictures { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 8px; width: 100%; }
.tga figure { margin: 0; position: relative; }
.tga figure img { display: block; width: 100%; height: auto; }
.tga figcaption { text-align: center; font-size: 12px; }
.tga .pair .other { display: none; }
.tga .pair:hover .one, .tga-flip .tga .pair .one { display: none; }
.tga .pair:hover .other, .tga-flip .tga .pair .other { display: block; }
.tga-flip .tga .pair:hover .one { display: block; }
.tga-flip .tga .pair:hover .other { display: none; }
.tga svg { max-width: 100%; height: auto; }
.tga .says { font-size: 14px; max-width: 125ch; }
.tga .error { color: var(--jp-error-color1, #d32f2f); white-space: pre-wrap; }
.tga .quiet { opacity: 0.75; }
.tga-working { opacity: 0.4; transition: opacity 0.15s; }
</style>"""


def block(body: str) -> str:
    """HTML in the explorer's style."""
    return f'<div class="tga">{body}</div>'


def sentence(text: str, kind: str = "quiet") -> str:
    """Plain ``text`` as HTML; ``kind`` is "quiet" or "error"."""
    return block(f'<span class="{kind}">{html.escape(text) or "&nbsp;"}</span>')


def document(body: str, title: str) -> str:
    """A file of its own, light or dark as the reader's browser is."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>:root {{ color-scheme: light dark; }} body {{ margin: 24px; max-width: {WIDEST}px; }}</style>\n"
        f'{STYLE}</head>\n<body class="tga"><h1>{html.escape(title)}</h1>{body}</body></html>\n'
    )


def says(text: str) -> str:
    """The one sentence of a panel, plain ``text``."""
    return f'<p class="says">{html.escape(text)}</p>'


def mixture_html(terms: TermGradients, Alpha: float, Beta: float) -> str:
    """The table of ``loss_mixture.mixture`` with what it says, and the cosines between gradients as a matrix."""
    table, between = mixture(terms, Alpha, Beta), cosines(terms)
    total = max(table.weighted["sum"], 1e-12)
    norms = table.gradient[list(TERMS)]
    longest = max(norms.max(), table.gradient["sum"], 1e-12)
    heads = (
        "term",
        "value",
        "weight",
        "weighted",
        "share",
        "gradient’s norm,<br>weighted",
        "",
        "its part<br>along the sum",
    )
    rows = []
    for name, row in table.iterrows():
        numbers = [_number(row[column]) for column in ("value", "weight", "weighted")]
        gradient = [_number(row.gradient, ".2f"), _bar(row.gradient / longest), _number(row.along, ".2f")]
        words = "weighted sum" if name == "sum" else name
        rows.append([words, *numbers, _bar(row.weighted / total), *gradient, _number(row.cosine, "+.2f")])
    norm = f"The three norms add to {norms.sum():.2f}; {table.gradient['sum']:.2f} is the norm of the summed gradient"
    apart = "shorter, as they do not all point its way: only their parts along the sum add up to it."
    note = f'<p class="quiet">{norm}, {apart}</p>'
    parts = _table((*heads, "cosine<br>with it"), rows, last="sum") + _matrix(between)
    return block(says(in_words(table, between)) + f'<div class="row">{parts}</div>{note}')


def _matrix(between: pd.DataFrame) -> str:
    """Cosines, blue where two gradients agree and orange where they are at odds."""
    rows = []
    for name, values in between.iterrows():
        cells = []
        for value in values:
            colour = "0,114,178" if value > 0 else "213,94,0"
            tint = 0 if np.isnan(value) else 0.55 * abs(value)
            words = _number(value, "+.2f")
            cells.append(
                f'<div style="background:rgba({colour},{tint:.2f});margin:0 -8px;padding:2px 8px">{words}</div>'
            )
        rows.append([name, *cells])
    return _table(("cosine of<br>two gradients", *between.columns), rows)


def attacked_html(models: Mapping[str, AttackedImage]) -> str:
    """Of each model by name: the image before and after, its attention, its answers; how attention moved in each."""
    rows = [_model_row(name, shown) for name, shown in models.items()]
    measures = list(next(iter(models.values())).shift.index)
    heads = "how attention moves", *map(html.escape, models)
    cells = [[SHIFT_NAMES[m], *(f"{shown.shift[m]:.2f}" for shown in models.values())] for m in measures]
    return block(says(attack_in_words(models)) + "".join(rows) + _table(heads, cells))


def attack_in_words(models: Mapping[str, AttackedImage]) -> str:
    """Whose answer flips, and how far attention moves."""
    words = []
    for name, shown in models.items():
        (was, p), (now, q) = shown.before[0], shown.after[0]
        changes = (
            f"flips from {was} ({p:.0%}) to {now} ({q:.0%})"
            if shown.flipped
            else f"stays {was} ({p:.0%}, then {q:.0%})"
        )
        words.append(f"{name}: the answer {changes}, attention moves by {shown.shift.l2:.2f}")
    return "; ".join(words) + "."


def _model_row(name: str, shown: AttackedImage) -> str:
    """Five pictures, two of which show what they were before the attack while the pointer is over them; answers."""
    sides = shown.image, shown.clean_map, shown.adversarial, shown.attacked_map
    factor = amplification(shown.image, shown.adversarial)
    image, clean, noise, after = attention_pictures(*sides, factor).values()
    size = f"{shown.image.shape[1]} × {shown.image.shape[2]}"
    attacked = pixels(shown.adversarial)
    pictures = [_figure((image, f"image, {size}")), _figure((attacked, "image, attacked"), (image, "image, clean"))]
    pictures += [_figure((noise, f"perturbation × {factor}")), _figure((clean, "attention, clean"))]
    pictures += [_figure((after, "attention, attacked"), (clean, "attention, clean"))]
    tables = []
    for head, classes in (("before", shown.before), ("under attack", shown.after)):
        rows = [[html.escape(label), f"{100 * p:.1f} %", _bar(p)] for label, p in classes[:4]]
        tables.append(_table((head, "", ""), rows))
    away = f'<span class="quiet">(led away from {html.escape(shown.label)})</span>'
    body = f'<div class="pictures">{"".join(pictures)}</div><div class="row">{"".join(tables)}</div>'
    return f'<h3>{html.escape(name)} {away}</h3><div class="row">{body}</div>'


def amplification(images: Tensor, adversarial: Tensor) -> int:
    """By what a perturbation is multiplied so that it can be seen."""
    return max(1, round(0.5 / max(float((adversarial - images).abs().max()), 1e-6)))


def attention_pictures(
    image: Tensor, clean_map: Tensor, adversarial: Tensor, attacked_map: Tensor, factor: int
) -> dict[str, np.ndarray]:
    """Caption -> picture ``[H,W,3]`` in [0,1] of images ``[3,H,W]`` and maps ``[h,w]``; ``factor``: amplification."""
    return {
        "image": pixels(image),
        "attention, clean": coloured(image, clean_map),
        f"perturbation × {factor}": pixels((0.5 + factor * (adversarial - image)).clamp(0, 1)),
        "attention, attacked": coloured(adversarial, attacked_map),
    }


def sweep_svg(sweep: pd.DataFrame, Alpha: float, Beta: float, tried: Sequence[Outcome] = ()) -> str:
    """Heat maps of accuracy over the measured grid, a ring at (Alpha, Beta), the nearest measured point outlined.

    A star where a model was tuned by hand.
    """
    alphas, betas = np.unique(sweep.Alpha), np.unique(sweep.Beta)
    width, height = 76 + CELL * len(betas), 64 + CELL * len(alphas)
    place = lambda a, b: _cell_centre(grid_position(sweep.Beta, b), len(alphas) - 1 - grid_position(sweep.Alpha, a))
    x, y = place(Alpha, Beta)
    marks = [_star(*place(*outcome.place), str(outcome)) for outcome in tried]
    marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="25" fill="none" stroke="#d81b60" stroke-width="2.5"/>')
    nearest = nearest_measured(sweep, Alpha, Beta).name
    groups = []
    for number, kind in enumerate(KINDS):
        body = _heat_map(sweep, kind, nearest) + _axes(f"{kind} accuracy (%)", alphas, betas) + "".join(marks)
        groups.append(f'<g transform="translate({number * width} 0)">{body}</g>')
    return _svg("".join(groups), len(KINDS) * width, height, "accuracy over Alpha and Beta")


def _star(x: float, y: float, words: str) -> str:
    """Beside a cell's numbers, up and to the right of the place."""
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2, 3.4, 8.0)
    points = " ".join(f"{x + 21 + r * np.cos(a):.1f},{y - 18 + r * np.sin(a):.1f}" for r, a in zip(radii, angles))
    shape = f'<polygon points="{points}" fill="#fff" stroke="#111" stroke-width="1.3">'
    return f"{shape}<title>{html.escape(words)}</title></polygon>"


def tried_html(outcomes: Sequence[Outcome], published: tuple[float, float]) -> str:
    """A table of what was tuned by hand, a row an Alpha and Beta."""
    rows = []
    for outcome in outcomes:
        a, b = outcome.place
        robust, _, clean = str(outcome).partition(" / ")
        name = "★ published setting" if outcome.place == published else "★ yours"
        rows.append([name, f"{a:g}", f"{b:g}", robust.removesuffix(" robust"), clean.removesuffix(" clean")])
    return _table(("tried here", "Alpha", "Beta", "robust (%)", "clean (%)"), rows) if rows else ""


def _cell_centre(column: float, row: float) -> tuple[float, float]:
    return LEFT + CELL * (column + 0.5), TOP + CELL * (row + 0.5)


def _heat_map(sweep: pd.DataFrame, kind: str, nearest: int) -> str:
    """A square a measured point, light where accuracy is high and grey where it is not counted (NaN)."""
    alphas, betas = np.unique(sweep.Alpha), np.unique(sweep.Beta)
    low, high = sweep[kind].min(), sweep[kind].max()
    viridis, drawn = matplotlib.colormaps["viridis"], []
    halves = sweep[f"{kind}_ci"]
    for point, alpha, beta, value, half in zip(sweep.index, sweep.Alpha, sweep.Beta, sweep[kind], halves):
        x, y = _cell_centre(np.searchsorted(betas, beta), len(alphas) - 1 - np.searchsorted(alphas, alpha))
        share = (value - low) / (high - low) if high > low else 0.5
        missing = np.isnan(value)
        colour = "#ddd" if missing else to_hex(viridis(share))
        edge = 'stroke="#d81b60" stroke-width="3"' if point == nearest else 'stroke="none"'
        place = f'x="{x - CELL / 2 + 2:g}" y="{y - CELL / 2 + 2:g}" width="{CELL - 4}" height="{CELL - 4}"'
        ink = "#111" if missing or share > 0.6 else "#fff"
        drawn.append(f'<rect {place} fill="{colour}" {edge}/>')
        drawn.append(_text(x, y + 4, _number(value, ".1f"), size=13, fill=ink))
        drawn.append(_text(x, y + 19, "" if np.isnan(half) else f"± {half:.1f}", size=10, fill=ink))
    return "".join(drawn)


def _axes(title: str, alphas: np.ndarray, betas: np.ndarray) -> str:
    (x, _), (_, y) = _cell_centre((len(betas) - 1) / 2, 0), _cell_centre(0, (len(alphas) - 1) / 2)
    bottom = TOP + CELL * len(alphas)
    words = [_text(x, 14, title, size=13), _text(x, bottom + 30, "Beta (weight of L_AMC)")]
    words.append(_text(14, y, "Alpha (weight of L_AR)", more=f'transform="rotate(-90 14 {y:g})"'))
    for row, alpha in enumerate(alphas[::-1]):
        words.append(_text(LEFT - 6, _cell_centre(0, row)[1] + 4, f"{alpha:g}", anchor="end"))
    for column, beta in enumerate(betas):
        words.append(_text(_cell_centre(column, 0)[0], bottom + 14, f"{beta:g}"))
    return "".join(words)


# Colour and dashes of the parts of the loss.
LINES = {"CE": ("#e69f00", ""), "L_AR": ("#009e73", "7 3"), "L_AMC": ("#cc79a7", "2 3")}


def curves_svg(history: Sequence[Mapping[str, float]], weights: tuple[float, float], total: int) -> str:
    """Of each step so far the loss and what its terms, weighted with (Alpha, Beta), add to it; of ``total`` steps."""
    width, height, right = 700, 190, 150
    parts = dict(zip(TERMS, (1.0, *weights)))
    lines = {name: [weight * row.get(name, np.nan) for row in history] for name, weight in parts.items()}
    lines["loss"] = [row["loss"] for row in history]
    high = max([0.1, *(v for values in lines.values() for v in values if np.isfinite(v))])
    across, up = (width - 48 - right) / max(1, total - 1), (height - 44) / high
    drawn, ends = [], {}
    for name, values in lines.items():
        colour, dashes = LINES.get(name, ("currentColor", ""))
        at = [(48 + across * row["step"], 10 + up * (high - v)) for row, v in zip(history, values) if np.isfinite(v)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        look = f'fill="none" stroke="{colour}" stroke-dasharray="{dashes}" stroke-width="1.8"'
        drawn.append(f'<polyline points="{points}" {look}/>')
        if at:
            weighted = "loss" if name == "loss" else name if name == "CE" else f"{parts[name]:g} {name}"
            ends[f"{weighted} {values[-1]:.2f}"] = colour, at[-1][1]
    words = [_text((width - right) / 2 + 24, height - 4, f"step (of {total})")]
    words += [_text(42, 16, f"{high:.1f}", anchor="end"), _text(42, height - 30, "0", anchor="end")]
    lowest = -np.inf
    for name, (colour, y) in sorted(ends.items(), key=lambda end: end[1][1]):  # labels from above, none over another
        lowest = max(y, lowest + 14)
        x = 48 + across * history[-1]["step"] + 8
        drawn.append(_text(x, lowest + 4, f'<tspan fill="{colour}">●</tspan> {name}', anchor="start", size=12))
    axis = f'<path d="M48 8V{height - 34}H{width - right}" fill="none" stroke="currentColor" stroke-opacity="0.4"/>'
    return _svg(axis + "".join(words + drawn), width, height, "loss of each step and its weighted terms")


def _number(value: float, form: str = ".3f") -> str:
    return "–" if np.isnan(value) else f"{value:{form}}"


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], last: str = "") -> str:
    """Of cells that are HTML; ``last``: the class of the last row."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    lines[-1] = lines[-1].replace("<tr>", f'<tr class="{last}">', 1)
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(lines)}</table>"


def _figure(*pictures: tuple[np.ndarray, str]) -> str:
    """One picture, pixels [H,W,3] in [0,1] and a caption; or two, of which one is there while the other is not."""
    parts = [f'<img alt="{words}" src="{_png(pixels)}"><figcaption>{words}</figcaption>' for pixels, words in pictures]
    if len(parts) == 1:
        return f"<figure>{parts[0]}</figure>"
    one, other = parts
    return f'<figure class="pair"><div class="one">{one}</div><div class="other">{other}</div></figure>'


def _png(pixels: np.ndarray) -> str:
    """As the model sees it; the browser makes it larger."""
    file = io.BytesIO()
    Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8)).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _text(
    x: float, y: float, words: str, anchor: str = "middle", size: int = 11, fill: str = "currentColor", more: str = ""
) -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" {more}'
    return f'<text {place} font-size="{size}" fill="{fill}">{words}</text>'


def _svg(body: str, width: int, height: int, label: str) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg {size} role="img" aria-label="{label}">{body}</svg>'
