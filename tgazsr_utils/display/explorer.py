"""The explorer: what Alpha and Beta do to the loss, and where attention goes under attack, as panels of widgets.

What a panel shows is computed by small functions without widgets. Each panel also knows a figure of its state, which takes
its place where no front end is there: headless runs, GitHub, exported HTML.
"""

import base64
import html
import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.attention import attention_shift, resize, text_guided_attention
from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import PRESET, Step, find_objective
from tgazsr_utils.core.settings import FinetuneSettings
from tgazsr_utils.core.training import attacked, trainable
from tgazsr_utils.datasets.loading import fit
from tgazsr_utils.display import plots
from tgazsr_utils.durable.finetuning import finetune
from tgazsr_utils.durable.weights import load_alike, read_metadata
from tgazsr_utils.measuring.attention_shift import as_frame
from tgazsr_utils.parameters import ExplorerNotebook
from tgazsr_utils.paths import DATA
from tgazsr_utils.progress import HEADLESS

TGA = find_objective("TGA-ZSR")
TERMS = ("CE", "L_AR", "L_AMC")
KINDS = ("robust", "clean", "average")
SHOWN = 176  # pixels, side of a picture


# --- what panels show, without widgets


@dataclass(frozen=True)
class LossParts:
    """The terms of the loss on one batch, and the inner products ``[3,3]`` of their gradients by the image encoder's weights."""

    values: tuple[float, ...]  # of TERMS, unweighted
    products: np.ndarray


def loss_parts(
    clip: Clip, original: Clip, images: Tensor, labels: Tensor, prompts: Sequence[str], settings: FinetuneSettings
) -> LossParts:
    """Of a batch ``images`` ``[B,3,H,W]`` in [0,1], ``labels`` ``[B]``, attacked against ``clip`` as in training."""
    tuned = clip.frozen_copy()
    weights = trainable(tuned.visual, settings.last_num_ft)
    batch = Step(tuned, original, images, labels, tuple(prompts))
    batch.adversarial = attacked(batch, TGA, settings, 0)
    terms = TGA.terms(batch, settings)
    slopes = []
    for term in terms:
        each = torch.autograd.grad(term.value, weights, retain_graph=True, allow_unused=True)
        slopes.append(torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(each, weights)]))
    slopes = torch.stack(slopes).double()
    return LossParts(tuple(term.value.item() for term in terms), (slopes @ slopes.T).cpu().numpy())


def mix(parts: LossParts, Alpha: float, Beta: float) -> pd.DataFrame:
    """One row a term and one for their weighted sum: weight, value, weighted value, and the gradient's norm and cosine with the sum's."""
    weight = np.array([1.0, Alpha, Beta])
    norms = np.sqrt(parts.products.diagonal())
    with_sum, whole = parts.products @ weight, np.sqrt(max(0.0, weight @ parts.products @ weight))
    scale = norms * whole
    rows = pd.DataFrame(
        {"weight": weight, "value": parts.values, "weighted": weight * parts.values, "gradient": weight * norms}, TERMS
    )
    rows["cosine"] = np.divide(with_sum, scale, out=np.full(3, np.nan), where=scale > 0)
    rows.loc["sum"] = [np.nan, np.nan, rows.weighted.sum(), whole, 1.0 if whole else np.nan]
    return rows


def cosines(parts: LossParts) -> dict[str, float]:
    """Of the gradients of each two terms; NaN where one is zero."""
    norms = np.sqrt(parts.products.diagonal())
    pairs = combinations(range(len(TERMS)), 2)
    return {
        f"{TERMS[i]}, {TERMS[j]}": parts.products[i, j] / n if (n := norms[i] * norms[j]) else np.nan for i, j in pairs
    }


@dataclass(frozen=True)
class Look:
    """One image before and after an attack, on the CPU."""

    image: Tensor  # [3,H,W] in [0,1]
    adversarial: Tensor  # [3,H,W]
    clean_map: Tensor  # [h,w], guided by a text
    attacked_map: Tensor  # [h,w]
    before: list[tuple[str, float]]  # the five likeliest classes and their probabilities
    after: list[tuple[str, float]]
    shift: pd.Series  # attention_shift's measures
    label: str  # the class that the attack leads away from


@torch.no_grad()
def look(
    clip: Clip,
    image: Tensor,
    label: int | None,
    data: ImageSet,
    text: str,
    eps_255: float,
    steps: int,
    variant: str,
    mask: Tensor | None = None,
) -> Look:
    """Attacks ``image`` ``[3,H,W]`` in [0,1] by PGD (linf, step eps/4) away from class ``label`` of ``data``, or from what it is seen as (None)."""
    prompts, guide = clip.encode_text(data.prompts), clip.encode_text([text])
    pixels = image[None].to(clip.device)
    if label is None:
        label = int(clip.logits(pixels, prompts).argmax())
    start = torch.Generator(clip.device).manual_seed(0)
    eps = eps_255 / 255
    moved = pgd(clip, pixels, torch.tensor([label], device=clip.device), prompts, eps, eps / 4, steps, generator=start)
    tokens = clip.encode_image(torch.cat([pixels, moved]))
    maps = text_guided_attention(tokens, guide[0], variant, grid=clip.grid)
    probable = clip.similarity(tokens.pooled, prompts).softmax(1).topk(min(5, len(prompts)))
    tops = [
        [(data.class_names[i], p) for i, p in zip(*row)]
        for row in zip(probable.indices.tolist(), probable.values.tolist())
    ]
    shift = as_frame(attention_shift(maps[:1], maps[1:], None if mask is None else mask[None].to(clip.device))).iloc[0]
    return Look(image.cpu(), moved[0].cpu(), maps[0].cpu(), maps[1].cpu(), *tops, shift, data.class_names[label])


def recorded_sweep(output: Path, world: str) -> tuple[pd.DataFrame | None, str]:
    """Notebook 03's table of Alpha and Beta and where it is from: ``output``, else for the mini-world the kept reference."""
    kept = DATA / "reference" / "mini" / "tables" / "ablation_alpha_beta.csv"
    for path, where in (
        (output / "tables" / kept.name, "measured here by notebook 03"),
        (kept, "the kept reference, three seeds"),
    ):
        if path.exists() and (path != kept or world == "mini-world"):
            return _read_sweep(path), where
    return None, "no sweep is recorded: run notebook 03"


def _read_sweep(path: Path) -> pd.DataFrame:
    try:
        sweep = pd.read_csv(path)
        if sweep.empty:
            raise ValueError("it has no rows")
        return sweep.astype(dict.fromkeys(("Alpha", "Beta", "robust", "clean", "average"), float))
    except (ValueError, KeyError) as error:  # also pandas' own, and bytes that are no text
        raise ValueError(f"table {path} is damaged ({' '.join(str(error).split())}); run notebook 03 again") from None


def nearest_measured(sweep: pd.DataFrame, Alpha: float, Beta: float) -> pd.Series:
    """The row of ``sweep`` nearest to (Alpha, Beta), where a step of the measured grid counts as one in either direction."""
    distance = sum(
        (np.array([grid_position(sweep[name], v) for v in sweep[name]]) - grid_position(sweep[name], value)) ** 2
        for name, value in (("Alpha", Alpha), ("Beta", Beta))
    )
    return sweep.iloc[int(np.argmin(distance))]


def grid_position(values: pd.Series, value: float) -> float:
    """Where ``value`` lies among the sorted distinct ``values``, counted from 0; held at the ends."""
    grid = np.unique(values)
    return float(np.interp(value, grid, np.arange(len(grid))))


# --- how it is drawn


_STYLE = """<style>
.tga { color: var(--jp-ui-font-color1, #222); font: 13px/1.45 var(--jp-ui-font-family, sans-serif); }
.tga table { border-collapse: collapse; } .tga td, .tga th { padding: 2px 8px; text-align: right; font-weight: normal; white-space: nowrap; }
.tga th { color: var(--jp-ui-font-color2, #555); border-bottom: 1px solid var(--jp-border-color1, #bbb); }
.tga td:first-child, .tga th:first-child { text-align: left; } .tga .sum td { border-top: 1px solid var(--jp-border-color1, #bbb); font-weight: 600; }
.tga .bar { display: inline-block; width: 96px; text-align: left; background: var(--jp-layout-color2, #eee); height: 10px; }
.tga .bar i { display: block; height: 10px; background: var(--jp-brand-color1, #1976d2); }
.tga .row { display: flex; flex-flow: row wrap; gap: 6px 22px; align-items: flex-start; margin-bottom: 6px; } .tga .row .bar { width: 64px; }
.tga figure { display: inline-block; margin: 0 12px 6px 0; vertical-align: top; } .tga figcaption { text-align: center; }
.tga .error { color: var(--jp-error-color1, #d32f2f); white-space: pre-wrap; } .tga .quiet { color: var(--jp-ui-font-color2, #555); }
</style>"""


def _html(body: str) -> str:
    return f'<div class="tga">{body}</div>'


def _number(value: float, form: str = ".3f") -> str:
    return "–" if np.isnan(value) else f"{value:{form}}"


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


def mixture_html(parts: LossParts, Alpha: float, Beta: float) -> str:
    """The table of ``mix``."""
    table = mix(parts, Alpha, Beta)
    total = max(table.weighted["sum"], 1e-12)
    lines = []
    for name, row in table.iterrows():
        first = "weighted sum" if name == "sum" else name
        cells = [
            first,
            _number(row.value),
            _number(row.weight),
            _number(row.weighted),
            _bar(row.weighted / total),
            _number(row.gradient),
            _number(row.cosine, "+.2f"),
        ]
        lines.append(
            f'<tr class="{"sum" if name == "sum" else ""}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    heads = ("term", "value", "weight", "weighted", "share", "gradient's norm, weighted", "cosine with the sum's")
    pairs = " &nbsp; ".join(f"{pair}: {_number(value, '+.2f')}" for pair, value in cosines(parts).items())
    head = "".join(f"<th>{head}</th>" for head in heads)
    return _html(
        f'<table><tr>{head}</tr>{"".join(lines)}</table><p class="quiet">Cosines between gradients &nbsp; {pairs}</p>'
    )


def _picture(pixels: np.ndarray, caption: str) -> str:
    """``pixels`` [H,W,3] in [0,1]."""
    file = io.BytesIO()
    Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8)).resize(
        (SHOWN, SHOWN), Image.Resampling.BILINEAR
    ).save(file, "PNG")
    code, words = base64.b64encode(file.getvalue()).decode(), html.escape(caption)
    return f'<figure><img width="{SHOWN}" height="{SHOWN}" alt="{words}" src="data:image/png;base64,{code}"><figcaption>{words}</figcaption></figure>'


def _with_attention(image: Tensor, attention: Tensor) -> np.ndarray:
    heat = resize(attention[None], tuple(image.shape[1:]))[0].numpy()
    return 0.35 * image.mean(0).numpy()[..., None] + 0.65 * matplotlib.colormaps["viridis"](heat)[..., :3]


def amplification(seen: Look) -> int:
    """By what a perturbation is multiplied so that it can be seen."""
    return max(1, round(0.5 / max(float((seen.adversarial - seen.image).abs().max()), 1e-6)))


def look_html(seen: Look) -> str:
    factor, show = amplification(seen), lambda t: t.permute(1, 2, 0).numpy()
    pictures = [
        _picture(show(seen.image), "image"),
        _picture(_with_attention(seen.image, seen.clean_map), "attention, clean"),
        _picture(show(0.5 + factor * (seen.adversarial - seen.image)), f"perturbation × {factor}"),
        _picture(_with_attention(seen.adversarial, seen.attacked_map), "attention, attacked"),
    ]
    rows = lambda top: "".join(
        f"<tr><td>{html.escape(name)}</td><td>{100 * p:.1f} %</td><td>{_bar(p)}</td></tr>" for name, p in top
    )
    tops = [
        f"<table><tr><th>{head}</th><th></th><th></th></tr>{rows(top)}</table>"
        for head, top in (("probability before", seen.before), ("after the attack", seen.after))
    ]
    names = {
        "l2": "distance (l2)",
        "cosine": "cosine",
        "iou_top20": "overlap of the top 20 %",
        "centre_move": "centre moved (patches)",
        "energy_clean": "inside object, clean",
        "energy_adv": "inside object, attacked",
        "energy_uniform": "if spread evenly",
    }
    shifts = "".join(f"<tr><td>{names[name]}</td><td>{value:.2f}</td></tr>" for name, value in seen.shift.items())
    shift = f"<table><tr><th>attention shift</th><th></th></tr>{shifts}</table>"
    flipped = "the attack flips the answer" if seen.before[0][0] != seen.after[0][0] else "the answer stays"
    return _html(
        f'{"".join(pictures)}<div class="row">{"".join(tops)}{shift}</div><p class="quiet">Away from: {html.escape(seen.label)}; {flipped}.</p>'
    )


def surface_svg(sweep: pd.DataFrame, Alpha: float, Beta: float) -> str:
    """Heat maps of robust, clean and average accuracy over the measured grid, with a ring at (Alpha, Beta) and the nearest point outlined."""
    alphas, betas = np.unique(sweep.Alpha), np.unique(sweep.Beta)
    cell, left, top = 58, 62, 26
    width, height = cell * len(betas), cell * len(alphas)
    x = left + cell * (grid_position(sweep.Beta, Beta) + 0.5)
    y = top + cell * (len(alphas) - 0.5 - grid_position(sweep.Alpha, Alpha))
    near = nearest_measured(sweep, Alpha, Beta)
    parts, text = [], 'fill="currentColor" font-size="11"'
    for number, kind in enumerate(KINDS):
        low, high = sweep[kind].min(), sweep[kind].max()  # NaN: not counted
        drawn = []
        for _, row in sweep.iterrows():
            i, j = len(alphas) - 1 - np.searchsorted(alphas, row.Alpha), np.searchsorted(betas, row.Beta)
            share = (row[kind] - low) / (high - low) if high > low else 0.5
            missing = np.isnan(row[kind])
            colour = "#ddd" if missing else matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](share))
            edge = 'stroke="#d81b60" stroke-width="3"' if row.name == near.name else 'stroke="none"'
            ink = "#111" if missing or share > 0.6 else "#fff"
            drawn.append(
                f'<rect x="{left + cell * j + 2}" y="{top + cell * i + 2}" width="{cell - 4}" height="{cell - 4}" fill="{colour}" {edge}/>'
                f'<text x="{left + cell * (j + 0.5)}" y="{top + cell * (i + 0.5) + 4}" text-anchor="middle" font-size="12" fill="{ink}">{_number(row[kind], ".1f")}</text>'
            )
        ticks = [
            f'<text x="{left - 6}" y="{top + height - cell * (i + 0.5) + 4}" text-anchor="end" {text}>{a:g}</text>'
            for i, a in enumerate(alphas)
        ]
        ticks += [
            f'<text x="{left + cell * (j + 0.5)}" y="{top + height + 14}" text-anchor="middle" {text}>{b:g}</text>'
            for j, b in enumerate(betas)
        ]
        ticks.append(
            f'<text x="{left + width / 2}" y="14" text-anchor="middle" fill="currentColor" font-size="13">{kind} accuracy (%)</text>'
        )
        ticks.append(
            f'<text x="{left + width / 2}" y="{top + height + 30}" text-anchor="middle" {text}>Beta (weight of L_AMC)</text>'
        )
        ticks.append(
            f'<text transform="translate(14 {top + height / 2}) rotate(-90)" text-anchor="middle" {text}>Alpha (weight of L_AR)</text>'
        )
        mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="19" fill="none" stroke="#d81b60" stroke-width="2.5"/>'
        parts.append(f'<g transform="translate({number * (left + width + 14)} 0)">{"".join(drawn + ticks)}{mark}</g>')
    size = f'width="{3 * (left + width + 14)}" height="{top + height + 38}"'
    return f'<svg {size} role="img" aria-label="accuracy over Alpha and Beta" style="max-width:100%">{"".join(parts)}</svg>'


def curve_svg(losses: Mapping[int, float], total: int, width: int = 620, height: int = 120) -> str:
    """The loss of each step so far, step -> loss, on an axis of ``total`` steps."""
    low, high = (min(losses.values()), max(losses.values())) if losses else (0.0, 1.0)
    spread = high - low or 1.0
    x, y = lambda i: 48 + (width - 60) * i / max(1, total - 1), lambda v: 10 + (height - 34) * (high - v) / spread
    points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in losses.items())
    text = 'fill="currentColor" font-size="11"'
    ends = ((16, f"{high:.2f}"), (height - 22, f"{low:.2f}")) if losses else ()
    words = "".join(f'<text x="42" y="{at}" text-anchor="end" {text}>{number}</text>' for at, number in ends)
    words += f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle" {text}>step (of {total})</text><text x="52" y="16" {text}>loss</text>'
    line = f'<polyline points="{points}" fill="none" stroke="var(--jp-brand-color1, #1976d2)" stroke-width="1.8"/>'
    axis = f'<path d="M48 8V{height - 22}H{width - 10}" fill="none" stroke="currentColor" stroke-opacity="0.4"/>'
    return f'<svg width="{width}" height="{height}" role="img" aria-label="loss of each step" style="max-width:100%">{axis}{words}{line}</svg>'


# --- panels


class Panel:
    """Widgets, and a figure of the same state for where there is no front end."""

    def __init__(self, children: Sequence[widgets.Widget], figure: Callable[[], Figure | None]):
        self.status = widgets.HTML(_html("&nbsp;"))
        self.widget = widgets.VBox(
            [widgets.HTML(_STYLE), *children, self.status], layout=widgets.Layout(max_width="920px")
        )
        self.figure = figure

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = {} if os.environ.get(HEADLESS) else dict(self.widget._repr_mimebundle_(**options))
        figure = self.figure()
        if figure is not None:
            file = io.BytesIO()
            figure.savefig(file, format="png", bbox_inches="tight")
            plt.close(figure)
            bundle["image/png"] = base64.b64encode(file.getvalue()).decode()
        return bundle | {"text/plain": f"{type(self).__name__}: widgets, or a figure of their state"}

    def say(self, text: str, kind: str = "quiet") -> None:
        self.status.value = _html(f'<span class="{kind}">{html.escape(text) or "&nbsp;"}</span>')

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """What goes wrong within is said in the panel."""
        try:
            yield
        except Exception as error:  # a panel stays usable whatever its input makes a library raise
            self.say(f"{type(error).__name__}: {error}", "error")


def _described(widget: type, description: str, width: str = "405px", **options: Any) -> widgets.Widget:
    return widget(
        description=description, style={"description_width": "104px"}, layout=widgets.Layout(width=width), **options
    )


def _weight_slider(name: str, meaning: str, value: float) -> widgets.FloatSlider:
    return _described(
        widgets.FloatSlider, name, value=value, min=0.0, max=0.4, step=0.005, readout_format=".3f", tooltip=meaning
    )


def _published_mark(slider: widgets.FloatSlider, value: float) -> widgets.HTML:
    """A line below a slider that says where on it the published value is; the track lies between description and readout."""
    at = 113 + 205 * (value - slider.min) / (slider.max - slider.min)
    return widgets.HTML(
        _html(f'<div style="padding-left:{at:.0f}px" class="quiet">▲ {value:g} published</div>'),
        layout=widgets.Layout(height="22px"),
    )


class Models:
    """The models there are to choose from, by name; loaded when first asked for, the last few kept."""

    def __init__(self, original: Clip, tuned: str | Path, folder: Path):
        self.original, self.folder = original, folder
        self._files: dict[str, Path] = {"tuned": Path(tuned)}
        self._loaded: dict[str, Clip] = {"original": original}
        self.look_again()

    def look_again(self) -> None:
        """Finds the models that the output folder holds, the latest first, at most 30."""
        for path in sorted(self.folder.glob("[!.]*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)[:30]:
            self._files.setdefault(self.name_of(path), path)

    @property
    def names(self) -> list[str]:
        return ["original", *self._files]

    @staticmethod
    def name_of(path: Path) -> str:
        """Such as "TGA-ZSR, Alpha 0.08, Beta 0.05, seed 0 (1f3a)"."""
        method, _, key = path.stem.rpartition("_seed")
        settings = read_metadata(path).get("settings", {})
        weights = "".join(
            f", {name} {settings[name]:g}" for name in ("Alpha", "Beta") if settings.get(name) is not None
        )
        return (
            f"{method or path.stem}{weights if 'TGA' in method else ''}, seed {settings.get('seed', '?')} ({key[-4:]})"
        )

    def __getitem__(self, name: str) -> Clip:
        if name not in self._loaded:
            self._loaded[name] = load_alike(self.original, self._files[name])
            while len(self._loaded) > 5:
                del self._loaded[next(name for name in self._loaded if name != "original")]
        return self._loaded[name]

    def history(self, name: str) -> pd.DataFrame:
        """Of a model's fine-tuning; empty if the file does not say."""
        return pd.DataFrame(read_metadata(self._files[name]).get("history", []))


class Explorer:
    """Four panels that share Alpha, Beta and the models: ``mixer``, ``attack``, ``surface`` and ``trainer``."""

    def __init__(self, models: Models, data: ImageSet, train: ImageSet, settings: ExplorerNotebook):
        self.models, self.data, self.train, self.settings = models, data, train, settings
        preset = TGA.with_preset(settings.only(FinetuneSettings))
        self.published = {name: PRESET[name] for name in ("Alpha", "Beta")}
        self.Alpha = _weight_slider("Alpha", "weight of L_AR", preset.Alpha)
        self.Beta = _weight_slider("Beta", "weight of L_AMC", preset.Beta)
        self.metric = _described(
            widgets.Dropdown, "distance", "260px", options=["l2", "l1", "cos"], value=settings.Distance_metric
        )
        self.variant = _described(
            widgets.Dropdown, "attention", "260px", options=["reference", "cosine"], value=settings.attention_variant
        )
        self.mixer, self.attack = LossMixer(self), AttackViewer(self)
        self.surface, self.trainer = OutcomeSurface(self), FineTuner(self)

    def finetuning(self, **changes: Any) -> FinetuneSettings:
        """The settings of the parameters cell with what the widgets say."""
        chosen = {"Alpha": self.Alpha.value, "Beta": self.Beta.value, "Distance_metric": self.metric.value}
        return TGA.with_preset(
            self.settings.only(FinetuneSettings, **chosen | {"attention_variant": self.variant.value} | changes)
        )

    def offer(self) -> None:
        """Puts models that have come into being among the choices."""
        self.models.look_again()
        for choice in (self.mixer.model, self.attack.model):
            chosen = choice.value
            choice.options = self.models.names
            choice.value = chosen


class LossMixer(Panel):
    """What the loss terms of one batch come to, and how they pull on the weights, at each Alpha and Beta."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.model = _described(widgets.Dropdown, "model", options=explorer.models.names, value="tuned")
        self.batch = _described(widgets.BoundedIntText, "batch", "260px", value=0, min=0, max=9999)
        reset = widgets.Button(
            description="published values",
            tooltip="put both sliders back",
            layout=widgets.Layout(margin="2px 2px 8px 112px"),
        )
        self.result = widgets.HTML(layout=widgets.Layout(min_height="170px"))
        sliders = []
        for slider in (explorer.Alpha, explorer.Beta):
            sliders += [slider, _published_mark(slider, explorer.published[slider.description])]
            slider.observe(lambda change: self.redraw(), "value")
        for choice in (self.model, self.batch, explorer.metric, explorer.variant):
            choice.observe(lambda change: self.compute(), "value")
        reset.on_click(lambda button: self.reset())
        choices = widgets.VBox([self.model, explorer.metric, explorer.variant, self.batch])
        left = widgets.VBox([*sliders, reset])
        super().__init__(
            [widgets.HBox([left, choices], layout=widgets.Layout(flex_flow="row wrap")), self.result], self._figure
        )
        self.parts: LossParts | None = None
        self.compute()

    def compute(self) -> None:
        """The terms anew; what an Alpha or Beta makes of them is ``redraw``'s."""
        self.say("computing …")
        with self.errors_shown():
            size, data = self.explorer.settings.batch_size or 16, self.explorer.train
            rows = torch.arange(self.batch.value * size, (self.batch.value + 1) * size) % len(data)
            chunk = next(data.batches([rows], self.explorer.models.original.device))
            clip, original = self.explorer.models[self.model.value], self.explorer.models.original
            self.parts = loss_parts(
                clip, original, chunk.images, chunk.labels, data.prompts, self.explorer.finetuning()
            )
            self.say(
                f"{len(chunk.labels)} training images of {data.key}, attacked as in training (epsilon {self.explorer.finetuning().train_eps:g}/255)"
            )
            self.redraw()

    def redraw(self) -> None:
        if self.parts is not None:
            self.result.value = mixture_html(self.parts, self.explorer.Alpha.value, self.explorer.Beta.value)

    def reset(self) -> None:
        self.explorer.Alpha.value, self.explorer.Beta.value = (
            self.explorer.published["Alpha"],
            self.explorer.published["Beta"],
        )

    def _figure(self) -> Figure | None:
        return self.parts and plots.loss_mixture(
            mix(self.parts, self.explorer.Alpha.value, self.explorer.Beta.value), cosines(self.parts)
        )


class AttackViewer(Panel):
    """One image under attack: pixels, attention guided by any text, probabilities, and how far attention moves."""

    def __init__(self, explorer: Explorer):
        self.explorer, data, settings = explorer, explorer.data, explorer.settings
        self.image = _described(widgets.IntSlider, "image", min=0, max=len(data) - 1, value=0, continuous_update=False)
        self.upload = widgets.FileUpload(
            accept="image/*",
            multiple=False,
            description="upload one",
            tooltip="an image of your own",
            layout=widgets.Layout(margin="2px 2px 2px 112px"),
        )
        self.text = _described(widgets.Text, "prompt", value="", placeholder="any text", continuous_update=False)
        self.model = _described(widgets.Dropdown, "model", options=explorer.models.names, value="original")
        self.eps = _described(
            widgets.FloatSlider,
            "epsilon (1/255)",
            min=0.0,
            max=16.0,
            step=0.25,
            value=settings.test_eps,
            continuous_update=False,
        )
        self.steps = _described(
            widgets.IntSlider, "steps", min=1, max=50, value=settings.test_numsteps, continuous_update=False
        )
        self.result = widgets.HTML(layout=widgets.Layout(min_height="410px"))
        self.own: Tensor | None = None  # an uploaded image [3,H,W]
        self.seen: Look | None = None
        left, right = (
            widgets.VBox([self.image, self.upload, self.text]),
            widgets.VBox([self.model, self.eps, self.steps]),
        )
        super().__init__(
            [widgets.HBox([left, right], layout=widgets.Layout(flex_flow="row wrap")), self.result], self._figure
        )
        self._choose()
        self.image.observe(lambda change: self._choose(), "value")
        self.upload.observe(lambda change: self._take(), "value")
        for choice in (self.text, self.model, self.eps, self.steps, explorer.variant):
            choice.observe(lambda change: self.redraw(), "value")
        self.redraw()

    def _choose(self) -> None:
        """An image of the set, with its class's prompt."""
        self.own = None
        prompt = self.explorer.data.prompts[int(self.explorer.data.labels[self.image.value])]
        same, self.text.value = self.text.value == prompt, prompt
        if same:
            self.redraw()

    def _take(self) -> None:
        """The uploaded image, as the model takes it."""
        with self.errors_shown():
            if self.upload.value:
                with Image.open(io.BytesIO(bytes(self.upload.value[0]["content"]))) as file:
                    fitted = fit(file.convert("RGB"), self.explorer.models.original.image_size[0], "crop")
                self.own = torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255
                self.redraw()

    def redraw(self) -> None:
        with self.errors_shown():
            data, i = self.explorer.data, self.image.value
            if self.own is None:
                image, label = next(data.batches([torch.tensor([i])])).images[0], int(data.labels[i])
                mask = None if data.masks is None else data.masks[i]
            else:
                image, label, mask = self.own, None, None
            if not self.text.value.strip():
                raise ValueError("the prompt is empty; attention needs a text that guides it")
            clip = self.explorer.models[self.model.value]
            started = time.perf_counter()
            self.seen = look(
                clip,
                image,
                label,
                data,
                self.text.value,
                self.eps.value,
                self.steps.value,
                self.explorer.variant.value,
                mask,
            )
            self.result.value = look_html(self.seen)
            source = "your image" if self.own is not None else f"image {i} of {data.key}, {data.world}"
            self.say(f"{source}; PGD with step epsilon/4; {time.perf_counter() - started:.2f} s")

    def _figure(self) -> Figure | None:
        if self.seen is None:
            return None
        seen = self.seen
        words = [f"{top[0][0]} ({top[0][1]:.0%})" for top in (seen.before, seen.after)]
        title = f"{self.model.value}, epsilon {self.eps.value:g}/255: “{self.text.value}”"
        return plots.attention_panels(
            seen.image[None],
            seen.clean_map[None],
            seen.adversarial[None],
            seen.attacked_map[None],
            [tuple(words)],
            title,
        )


class OutcomeSurface(Panel):
    """What was measured over Alpha and Beta, and where the sliders are among it."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.sweep, self.where = recorded_sweep(explorer.settings.output_path, explorer.data.world)
        self.result = widgets.HTML(layout=widgets.Layout(min_height="250px" if self.sweep is not None else "20px"))
        super().__init__(
            [widgets.HBox([explorer.Alpha, explorer.Beta], layout=widgets.Layout(flex_flow="row wrap")), self.result],
            self._figure,
        )
        for slider in (explorer.Alpha, explorer.Beta):
            slider.observe(lambda change: self.redraw(), "value")
        self.redraw()

    def redraw(self) -> None:
        if self.sweep is None:
            return self.say(self.where)
        a, b = self.explorer.Alpha.value, self.explorer.Beta.value
        near = nearest_measured(self.sweep, a, b)
        self.result.value = _html(surface_svg(self.sweep, a, b))
        found = ", ".join(f"{kind} {near[kind]:.1f} ± {near[f'{kind}_ci']:.1f}" for kind in KINDS)
        self.say(
            f"Sliders at ({a:g}, {b:g}); nearest measured, outlined: ({near.Alpha:g}, {near.Beta:g}): {found} ({self.where}). Nothing between is measured."
        )

    def _figure(self) -> Figure | None:
        if self.sweep is None:
            return None
        mark = {name: grid_position(self.sweep[name], getattr(self.explorer, name).value) for name in ("Alpha", "Beta")}
        return plots.alpha_beta(
            self.sweep, f"Accuracy over Alpha and Beta ({self.where}); the ring is where the sliders are", mark
        )


class FineTuner(Panel):
    """Fine-tunes the original model at the sliders' Alpha and Beta in the background; the kernel stays free."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.start = widgets.Button(
            description="Fine-tune", button_style="primary", tooltip="train TGA-ZSR at this Alpha and Beta"
        )
        self.stop = widgets.Button(description="Cancel", disabled=True, tooltip="stop after the current step")
        self.bar = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(width="300px"))
        self.curve = widgets.HTML(_html(curve_svg({}, 1)), layout=widgets.Layout(min_height="130px"))
        self.losses: dict[int, float] = {}  # of the steps of this run that were seen
        self.thread: threading.Thread | None = None
        self._cancelled, self._guard = threading.Event(), threading.Lock()
        self.start.on_click(lambda button: self.begin())
        self.stop.on_click(lambda button: self.cancel())
        super().__init__(
            [
                widgets.HBox([explorer.Alpha, explorer.Beta], layout=widgets.Layout(flex_flow="row wrap")),
                widgets.HBox([self.start, self.stop, self.bar]),
                self.curve,
            ],
            self._figure,
        )
        self.say(
            f"{len(explorer.train)} images of {explorer.train.key}, {explorer.settings.epochs} epoch(s); the model then joins the choices above"
        )

    def begin(self) -> None:
        """Starts a run, unless one is under way."""
        with self._guard:
            if self.thread is not None and self.thread.is_alive():
                return
            self.start.disabled, self.stop.disabled = True, False
            self.losses.clear()
            self._cancelled.clear()
            self.thread = threading.Thread(target=self._run, args=(self.explorer.finetuning(),), daemon=True)
            self.thread.start()

    def cancel(self) -> None:
        self._cancelled.set()
        self.stop.disabled = True
        self.say("stopping after this step …")

    def _run(self, settings: FinetuneSettings) -> None:
        what = f"TGA-ZSR at Alpha {settings.Alpha:g}, Beta {settings.Beta:g}"
        self.say(f"{what}: starting …")
        try:
            with self.errors_shown():
                models = self.explorer.models
                tuned = finetune(
                    models.original,
                    self.explorer.train,
                    TGA,
                    settings,
                    models.folder,
                    self._cancelled.is_set,
                    watch=self._watch,
                )
                self.explorer.offer()
                self.bar.value = self.bar.max
                self.say(f"{what} is trained: “{models.name_of(tuned.weights)}” is among the models now")
        except KeyboardInterrupt:
            self.say(
                f"{what} was cancelled after step {self.bar.value} of {self.bar.max}; the same button goes on from there"
            )
        finally:
            self.start.disabled, self.stop.disabled = False, True

    def _watch(self, done: int, total: int, row: Mapping[str, float]) -> None:
        """After each step."""
        self.losses[done - 1] = row["loss"]
        self.bar.max, self.bar.value = total, done
        if done % 5 == 0 or done == total or len(self.losses) == 1:
            self.curve.value = _html(curve_svg(self.losses, total))
            self.say(f"step {done} of {total}: " + ", ".join(f"{name} {row[name]:.3f}" for name in ("loss", *TERMS)))

    def _figure(self) -> Figure | None:
        history = self.explorer.models.history("tuned")
        return (
            plots.loss_terms({"the tuned model": history}, "Fine-tuning, as the kept model was")
            if len(history)
            else None
        )
