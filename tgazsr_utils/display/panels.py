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

from tgazsr_utils.core.attention import resize
from tgazsr_utils.measuring.attacked_image import AttackedImage
from tgazsr_utils.measuring.loss_mixture import TermGradients, cosines, mixture
from tgazsr_utils.measuring.recorded_sweep import KINDS, grid_position, nearest_measured

SIDE = 176  # of a picture, in pixels
CELL, LEFT, TOP = 58, 62, 26  # pixels: a cell of a heat map, and what is before its first one
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
.tga table { border-collapse: collapse; margin: 0; }
.tga td, .tga th { padding: 2px 8px; text-align: right; font-weight: normal; white-space: nowrap; }
.tga th { opacity: 0.75; border-bottom: 1px solid currentColor; }
.tga td:first-child, .tga th:first-child { text-align: left; }
.tga .sum td { border-top: 1px solid currentColor; font-weight: 600; }
.tga .bar { display: inline-block; width: 96px; height: 10px; text-align: left; background: #8883; }
.tga .bar i { display: block; height: 10px; background: var(--jp-brand-color1, #1976d2); }
.tga .row { display: flex; flex-flow: row wrap; gap: 6px 22px; align-items: flex-start; margin-bottom: 6px; }
.tga .row .bar { width: 64px; }
.tga figure { display: inline-block; margin: 0 12px 6px 0; vertical-align: top; }
.tga figcaption { text-align: center; }
.tga svg { max-width: 100%; height: auto; }
.tga .error { color: var(--jp-error-color1, #d32f2f); white-space: pre-wrap; }
.tga .quiet { opacity: 0.75; }
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
        "<style>:root { color-scheme: light dark; } body { margin: 24px; max-width: 920px; }</style>\n"
        f'{STYLE}</head>\n<body class="tga"><h1>{html.escape(title)}</h1>{body}</body></html>\n'
    )


def mixture_html(terms: TermGradients, Alpha: float, Beta: float) -> str:
    """The table of ``loss_mixture.mixture``, and the cosines between gradients."""
    table = mixture(terms, Alpha, Beta)
    total = max(table.weighted["sum"], 1e-12)
    heads = ("term", "value", "weight", "weighted", "share", "gradient's norm, weighted", "cosine with the sum's")
    rows = []
    for name, row in table.iterrows():
        numbers = [_number(row[column]) for column in ("value", "weight", "weighted")]
        gradient = [_number(row.gradient), _number(row.cosine, "+.2f")]
        rows.append(["weighted sum" if name == "sum" else name, *numbers, _bar(row.weighted / total), *gradient])
    pairs = " &nbsp; ".join(f"{pair}: {_number(value, '+.2f')}" for pair, value in cosines(terms).items())
    between = f'<p class="quiet">Cosines between gradients &nbsp; {pairs}</p>'
    return block(_table(heads, rows, last="sum") + between)


def attacked_image_html(shown: AttackedImage) -> str:
    """The image as the model sees it, attention and perturbation; the likeliest classes and how attention moved."""
    sides = shown.image, shown.clean_map, shown.adversarial, shown.attacked_map
    pictures = attention_pictures(*sides, amplification(shown.image, shown.adversarial))
    seen = f"model's view, {shown.image.shape[1]} × {shown.image.shape[2]}"
    pictures = {seen: pictures.pop("image")} | pictures
    tables = []
    for head, classes in (("probability before", shown.before), ("after the attack", shown.after)):
        rows = [[html.escape(name), f"{100 * p:.1f} %", _bar(p)] for name, p in classes]
        tables.append(_table((head, "", ""), rows))
    shifts = [[SHIFT_NAMES[name], f"{value:.2f}"] for name, value in shown.shift.items()]
    tables.append(_table(("attention shift", ""), shifts))
    flipped = "the answer stays" if shown.before[0][0] == shown.after[0][0] else "the attack flips the answer"
    away = f'<p class="quiet">Away from: {html.escape(shown.label)}; {flipped}.</p>'
    drawn = "".join(_picture(pixels, caption) for caption, pixels in pictures.items())
    return block(f'{drawn}<div class="row">{"".join(tables)}</div>{away}')


def amplification(images: Tensor, adversarial: Tensor) -> int:
    """By what a perturbation is multiplied so that it can be seen."""
    return max(1, round(0.5 / max(float((adversarial - images).abs().max()), 1e-6)))


def attention_pictures(
    image: Tensor, clean_map: Tensor, adversarial: Tensor, attacked_map: Tensor, factor: int
) -> dict[str, np.ndarray]:
    """Caption -> picture ``[H,W,3]`` in [0,1] of images ``[3,H,W]`` and maps ``[h,w]``; ``factor``: amplification."""
    return {
        "image": _pixels(image),
        "attention, clean": _with_attention(image, clean_map),
        f"perturbation × {factor}": _pixels((0.5 + factor * (adversarial - image)).clamp(0, 1)),
        "attention, attacked": _with_attention(adversarial, attacked_map),
    }


def sweep_svg(sweep: pd.DataFrame, Alpha: float, Beta: float) -> str:
    """Heat maps of accuracy over the measured grid, a ring at (Alpha, Beta), the nearest measured point outlined."""
    alphas, betas = np.unique(sweep.Alpha), np.unique(sweep.Beta)
    width, height = 76 + CELL * len(betas), 64 + CELL * len(alphas)
    ring_at = grid_position(sweep.Beta, Beta), len(alphas) - 1 - grid_position(sweep.Alpha, Alpha)
    x, y = _cell_centre(*ring_at)
    ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="19" fill="none" stroke="#d81b60" stroke-width="2.5"/>'
    nearest = nearest_measured(sweep, Alpha, Beta).name
    groups = []
    for number, kind in enumerate(KINDS):
        body = _heat_map(sweep, kind, nearest) + _axes(f"{kind} accuracy (%)", alphas, betas) + ring
        groups.append(f'<g transform="translate({number * width} 0)">{body}</g>')
    return _svg("".join(groups), len(KINDS) * width, height, "accuracy over Alpha and Beta")


def _cell_centre(column: float, row: float) -> tuple[float, float]:
    return LEFT + CELL * (column + 0.5), TOP + CELL * (row + 0.5)


def _heat_map(sweep: pd.DataFrame, kind: str, nearest: int) -> str:
    """A square a measured point, light where accuracy is high and grey where it is not counted (NaN)."""
    alphas, betas = np.unique(sweep.Alpha), np.unique(sweep.Beta)
    low, high = sweep[kind].min(), sweep[kind].max()
    viridis, drawn = matplotlib.colormaps["viridis"], []
    for point, alpha, beta, value in zip(sweep.index, sweep.Alpha, sweep.Beta, sweep[kind]):
        x, y = _cell_centre(np.searchsorted(betas, beta), len(alphas) - 1 - np.searchsorted(alphas, alpha))
        share = (value - low) / (high - low) if high > low else 0.5
        missing = np.isnan(value)
        colour = "#ddd" if missing else to_hex(viridis(share))
        edge = 'stroke="#d81b60" stroke-width="3"' if point == nearest else 'stroke="none"'
        place = f'x="{x - CELL / 2 + 2:g}" y="{y - CELL / 2 + 2:g}" width="{CELL - 4}" height="{CELL - 4}"'
        ink = "#111" if missing or share > 0.6 else "#fff"
        drawn.append(f'<rect {place} fill="{colour}" {edge}/>')
        drawn.append(_text(x, y + 4, _number(value, ".1f"), size=12, fill=ink))
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


def curve_svg(losses: Mapping[int, float], total: int, width: int = 620, height: int = 120) -> str:
    """The loss of each step so far, step -> loss, on an axis of ``total`` steps."""
    low, high = (min(losses.values()), max(losses.values())) if losses else (0.0, 1.0)
    across, up = (width - 60) / max(1, total - 1), (height - 34) / (high - low or 1.0)
    points = " ".join(f"{48 + across * step:.1f},{10 + up * (high - loss):.1f}" for step, loss in losses.items())
    words = [_text(width / 2, height - 4, f"step (of {total})"), _text(width - 12, 16, "loss", anchor="end")]
    if losses:
        words += [_text(42, 16, f"{high:.2f}", anchor="end"), _text(42, height - 22, f"{low:.2f}", anchor="end")]
    line = f'<polyline points="{points}" fill="none" stroke="var(--jp-brand-color1, #1976d2)" stroke-width="1.8"/>'
    axis = f'<path d="M48 8V{height - 22}H{width - 10}" fill="none" stroke="currentColor" stroke-opacity="0.4"/>'
    return _svg(axis + "".join(words) + line, width, height, "loss of each step")


def _number(value: float, form: str = ".3f") -> str:
    return "–" if np.isnan(value) else f"{value:{form}}"


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], last: str = "") -> str:
    """Of cells that are HTML; ``last``: the class of the last row."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    lines[-1] = lines[-1].replace("<tr>", f'<tr class="{last}">', 1)
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(lines)}</table>"


def _pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()


def _with_attention(image: Tensor, attention: Tensor) -> np.ndarray:
    heat = resize(attention[None], tuple(image.shape[1:]))[0].cpu().numpy()
    grey = image.mean(0).cpu().numpy()[..., None]
    return 0.35 * grey + 0.65 * matplotlib.colormaps["viridis"](heat)[..., :3]


def _picture(pixels: np.ndarray, caption: str) -> str:
    """``pixels`` [H,W,3] in [0,1]."""
    file = io.BytesIO()
    small = Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))
    small.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = f'<img width="{SIDE}" height="{SIDE}" alt="{caption}" src="{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _text(
    x: float, y: float, words: str, anchor: str = "middle", size: int = 11, fill: str = "currentColor", more: str = ""
) -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" {more}'
    return f'<text {place} font-size="{size}" fill="{fill}">{words}</text>'


def _svg(body: str, width: int, height: int, label: str) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg {size} role="img" aria-label="{label}">{body}</svg>'
