"""The workbook's figures. Each function takes plain frames or arrays, a question as its title and a caption in small
print, and returns a matplotlib Figure; how all of them look is ``display.style``'s."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tgazsr_utils.datasets.published_sets import in_means
from tgazsr_utils.display.style import PUBLISHED, drawn, headed, looks, of_each, or_dash, signed

STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "h")


@drawn
def captioned_images(
    images: Tensor, captions: Sequence[str], title: str, caption: str = "", columns: int = 6
) -> Figure:
    """A grid of images ``[N,3,H,W]`` (uint8) with their captions."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, words in zip(axes.flat, images, captions):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="none")
        axis.set_title("\n".join(textwrap.wrap(words, 24)), fontsize=8)
    return headed(figure, title, caption, f"{len(images)} images: {'; '.join(captions)}")


@drawn
def pretraining_curve(history: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Contrastive loss against the step, as measured and as a running mean of 50 steps."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    smooth = history.loss.rolling(50, min_periods=1).mean()
    axis.plot(history.step, history.loss, alpha=0.3, lw=0.8, label="each step")
    axis.plot(history.step, smooth, label="mean of 50")
    axis.set(xlabel="step", ylabel="contrastive loss (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return headed(figure, title, caption, _from_to("contrastive loss", smooth))


def _from_to(name: str, curve: pd.Series) -> str:
    known = curve.dropna()
    return f"{name} from {known.iloc[0]:.2f} to {known.iloc[-1]:.2f}" if len(known) else f"{name}: not measured"


@drawn
def fragility(table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Accuracy against epsilon, a thin line a set and a thick one for the mean; columns "clean" and "eps E"."""
    eps, markers = [0.0, *(float(c.removeprefix("eps ")) for c in table.columns[1:])], cycle(MARKERS)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for key, row in table.drop("MEAN").iterrows():
        told_apart = (
            {"label": key, "marker": next(markers), "ms": 4} if len(table) <= len(MARKERS) else {"color": "0.6"}
        )
        axis.plot(eps, row.to_numpy(), lw=1.2, alpha=0.6, **told_apart)
    mean = table.loc["MEAN"]
    axis.plot(eps, mean.to_numpy(), color="black", lw=3, marker="o", label="mean")
    axis.axhline(mean["clean"] / 4, color="grey", ls=":", label="a quarter of the clean mean")
    axis.set(xlabel="epsilon (1/255)", ylabel="top-1 accuracy (%)", ylim=(0, 100))
    axis.legend(fontsize=9)
    means = ", ".join(f"{accuracy:.1f} % at epsilon {e:g}/255" for e, accuracy in zip(eps, mean))
    return headed(figure, title, caption, f"mean accuracy {means}")


_SHIFT_LABELS = {
    "l2": "l2 distance of the maps",
    "cosine": "cosine similarity",
    "iou_top20": "overlap (IoU) of the top fifth",
    "centre_move": "centre moves by (patches)",
}


@drawn
def shift_against_eps(frame: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Mean of each shift measure against epsilon, one line a model; bars are 95 % bootstrap intervals over images."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    drawn = looks(frame.model)
    style = {"palette": {name: look.color for name, look in drawn.items()}, "errorbar": ("ci", 95), "seed": 0}
    style |= {"markers": {name: look.marker for name, look in drawn.items()}, "dashes": False, "err_style": "bars"}
    for axis, (column, label) in zip(axes, _SHIFT_LABELS.items()):
        sns.lineplot(frame, x="eps_255", y=column, hue="model", style="model", ax=axis, ms=8, **style)
        axis.set(xlabel="epsilon (1/255)", ylabel="", xticks=sorted(frame.eps_255.unique()))
        axis.set_title(label, fontsize=11)
        handles, labels = axis.get_legend_handles_labels()
        axis.get_legend().remove()
    figure.legend(handles, labels, loc="outside right center")
    means = frame.groupby(["eps_255", "model"], sort=False).l2.mean()
    numbers = ", ".join(f"{value:.2f} at epsilon {eps:g}/255 ({model})" for (eps, model), value in means.items())
    return headed(figure, title, caption, f"mean l2 distance {numbers}")


def auc_interval(flipped: np.ndarray, score: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """ROC AUC of ``score`` for ``flipped`` (bool), with its 95 % bootstrap interval; NaN if one class is missing."""
    if flipped.all() or not flipped.any():
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    rows = np.array([rng.integers(len(flipped), size=len(flipped)) for _ in range(draws)])
    drawn = flipped[rows]
    both = drawn.any(1) & ~drawn.all(1)
    values = _areas(drawn[both], score[rows][both])
    return float(_areas(flipped[None], score[None])[0]), *map(float, np.quantile(values, [0.025, 0.975]))


def _areas(flipped: np.ndarray, score: np.ndarray) -> np.ndarray:
    """ROC AUC of each row ``[R,N]``, from the sum of the ranks of what flipped (Mann and Whitney 1947)."""
    ones = flipped.sum(1)
    ranks = (scipy.stats.rankdata(score, axis=1) * flipped).sum(1)
    return (ranks - ones * (ones + 1) / 2) / (ones * (flipped.shape[1] - ones))


@drawn
def flip_roc(frame: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """ROC of "attention moved by more than t" as a sign that the prediction flipped, among images right when clean."""
    from sklearn.metrics import roc_curve  # slow to import

    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    labels = []
    for name, part in frame[frame.clean_correct].groupby("model", sort=False):
        look, (auc, low, high) = looks([name])[name], auc_interval(part.flipped.to_numpy(), part.l2.to_numpy())
        curve: tuple = ([], [])
        if np.isnan(auc):
            labels.append(f"{name}: all alike, no AUC")
        else:
            labels.append(f"{name}: AUC {auc:.2f} [{low:.2f}, {high:.2f}]")
            curve = roc_curve(part.flipped, part.l2)[:2]
        axis.plot(*curve, look.line, color=look.color, lw=2, label=labels[-1])
    axis.plot([0, 1], [0, 1], color="grey", lw=1, label="chance")
    axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    figure.legend(title="shift predicts the flip", loc="outside right center", fontsize=9)
    return headed(figure, title, caption, "; ".join(labels))


@drawn
def energy_boxes(frame: pd.DataFrame, region: str, title: str, caption: str = "") -> Figure:
    """Share of attention inside the object's ``region`` ("mask" or "box"), two boxes a model; the line is chance."""
    sides, style = {"energy_clean": "clean", "energy_adv": "attacked"}, looks(frame.model)
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (name, part) in enumerate(frame.groupby("model", sort=False)):
        for shift, column in zip((-0.2, 0.2), sides):
            at = {"positions": [number + shift], "widths": 0.34, "patch_artist": True, "flierprops": {"ms": 2}}
            boxes = axis.boxplot(part[column], **at, medianprops={"color": "black", "lw": 1.5})
            fill = (
                {"facecolor": "white", "hatch": "///"} if shift > 0 else {"facecolor": style[name].color, "alpha": 0.6}
            )
            boxes["boxes"][0].set(edgecolor=style[name].color, **fill)
    chance, models = frame.energy_uniform.mean(), list(dict.fromkeys(frame.model))
    line = axis.axhline(chance, color="black", ls=":", label="spread evenly")
    axis.set(xticks=range(len(models)), xticklabels=models, ylim=(0, None))
    axis.set_ylabel(f"share of attention inside\nthe object's {region}")
    figure.legend(handles=[*_CLEAN_AND_ATTACKED, line], loc="outside right center")
    medians = frame.groupby("model", sort=False)[list(sides)].median()
    numbers = [
        f"{name}: median {row.energy_clean:.2f} clean, {row.energy_adv:.2f} attacked"
        for name, row in medians.iterrows()
    ]
    return headed(figure, title, caption, "; ".join([*numbers, f"spread evenly: {chance:.2f}"]))


_CLEAN_AND_ATTACKED = (
    Patch(facecolor="0.5", edgecolor="0.3", label="clean"),
    Patch(facecolor="white", edgecolor="0.3", hatch="///", label="attacked"),
)


@drawn
def loss_terms(histories: dict[str, pd.DataFrame], title: str, caption: str = "") -> Figure:
    """Unweighted loss terms and batch accuracy under attack against the step, a method a line, running means of 10."""
    terms = list(dict.fromkeys(c for h in histories.values() for c in h if c == "CE" or c.startswith("L_")))
    labels = {name: name for name in terms} | {"CE": "CE, attacked images"}
    labels["robust_batch_accuracy"] = "robust batch accuracy (%)"
    names = [*terms, "robust_batch_accuracy"]
    lines, columns = {}, min(4, len(names))
    rows = -(-len(names) // columns)
    size = 3.1 * columns + 1.6, 3.0 * rows + 0.8
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = grid.ravel()
    style, numbers = looks(histories), []
    for method, history in histories.items():
        smooth = history.rolling(10, min_periods=1).mean()
        smooth["robust_batch_accuracy"] *= 100
        color, marker, line = style[method]
        marks = {"marker": marker, "ms": 5, "markevery": max(1, len(smooth) // 6)}
        for axis, name in zip(axes, names):
            if name in history:
                (lines[method],) = axis.plot(history.step, smooth[name], line, color=color, label=method, **marks)
                numbers.append(_from_to(f"{method}: {labels[name]}", smooth[name]))
    for axis, name in zip(axes, names):
        axis.set(xlabel="step")
        axis.set_title(labels[name], fontsize=11)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    figure.legend(handles=list(lines.values()), loc="outside right center", fontsize=9)
    return headed(figure, title, caption, "; ".join(numbers))


@drawn
def accuracy_bars(frame: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Clean and robust accuracy of each method on one set, with Wilson intervals; ``frame``: tables.to_frame."""
    methods = list(dict.fromkeys(frame.method))
    figure, axis = plt.subplots(figsize=(7.2, 0.55 * len(methods) + 1.6), layout="constrained")
    colors = [look.color for look in looks(methods).values()]
    parts = {kind: frame[frame.kind == kind].set_index("method").reindex(methods) for kind in ("clean", "robust")}
    for shift, (kind, part) in zip((-0.2, 0.2), parts.items()):
        error = [part.accuracy - part.low, part.high - part.accuracy]
        error = [side.clip(lower=0) for side in error]  # rounding at 0 and 100 %
        fill = {"color": colors, "alpha": 0.6} if kind == "clean" else {"color": "white", "hatch": "///"}
        place = np.arange(len(methods)) + shift
        axis.barh(place, part.accuracy, 0.36, edgecolor=colors, **fill)
        axis.errorbar(part.accuracy, place, xerr=error, fmt="none", ecolor="black", capsize=3, clip_on=False)
    axis.set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.5, -0.5))
    axis.set(xlabel="top-1 accuracy (%)", xlim=(0, 100))
    axis.grid(visible=False, axis="y")
    figure.legend(handles=_CLEAN_AND_ATTACKED, loc="outside right center")
    numbers = [
        f"{method}: {', '.join(f'{kind} {or_dash(part.accuracy[method])} %' for kind, part in parts.items())}"
        for method in methods
    ]
    return headed(figure, title, caption, "; ".join(numbers))


@drawn
def accuracy_heatmap(frame: pd.DataFrame, title: str, caption: str = "", tuned_on: str | None = None) -> Figure:
    """Accuracy by method and set, robust above clean, mean over seeds; blank where not all seeds are counted.

    ``frame``: tables.to_frame; ``tuned_on``: the set, if it is among them, whose name has a star.
    """
    methods, sets = list(dict.fromkeys(frame.method)), list(dict.fromkeys(frame.dataset))
    counted = frame.groupby(["method", "kind"]).seed.transform("nunique")
    whole = frame[counted == frame.groupby("method").seed.transform("nunique")]
    size = 0.56 * len(sets) + 4, 0.72 * len(methods) + 3
    figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    cells = {"annot": True, "fmt": ".0f", "annot_kws": {"size": 9}, "linewidths": 0.5, "cbar": False}
    means = {}
    for axis, kind in zip(axes, ("robust", "clean")):
        table = whole[whole.kind == kind].pivot_table(index="method", columns="dataset", values="accuracy")
        table = table.reindex(index=methods, columns=sets)
        table["MEAN"] = means[kind] = table[in_means(sets)].mean(axis=1)
        sns.heatmap(table, cmap="viridis", vmin=0, vmax=100, ax=axis, **cells)
        axis.axvline(len(sets), color="white", lw=4)
        axis.set(title=f"{kind} accuracy (%)", xlabel="", ylabel="")
        starred = [f"★ {name}" if name == tuned_on else name for name in table]
        axis.set_xticks(axis.get_xticks(), starred)
        _names_upright(axis)
    if tuned_on in sets:
        caption = "; ".join(part for part in (caption, f"★ {tuned_on}: the set that is tuned on") if part)
    figure.colorbar(axes[0].collections[0], ax=axes, label="top-1 accuracy (%)", aspect=40, shrink=0.8)
    numbers = [f"{m}: robust {or_dash(means['robust'][m])} %, clean {or_dash(means['clean'][m])} %" for m in methods]
    return headed(figure, title, caption, f"mean over sets, {'; '.join(numbers)}")


def _names_upright(axis: Axes) -> None:
    """Names of rows lie, and those of columns lean, so that long ones can be read."""
    plt.setp(axis.get_xticklabels(), rotation=35, ha="right", rotation_mode="anchor")
    plt.setp(axis.get_yticklabels(), rotation=0)


@drawn
def trade_off(
    table: pd.DataFrame, title: str, published: Mapping[str, pd.DataFrame] | None = None, caption: str = ""
) -> Figure:
    """Robust against clean accuracy, a point a method, its area the average; grey lines join equal averages.

    ``table``: tables.leaderboard, whose 95 % intervals become error bars; ``published``: published.points, whose points
    are grey, hollow and joined to ours.
    """
    figure, axis = plt.subplots(figsize=(8.2, 5.4), layout="constrained")
    published = published or {}
    every = pd.concat([table, *published.values()])
    highest = max(1.0, every.average.max())
    area = lambda average: 60 if np.isnan(average) else max(9, 260 * average / highest)  # square points
    reach = {kind: np.array(between_0_and_100(table[kind], table[f"{kind}_ci"])) for kind in ("clean", "robust")}
    for n, ((method, row), look) in enumerate(zip(table.iterrows(), looks(table.index).values())):
        bars = {"xerr": reach["clean"][:, [n]], "yerr": reach["robust"][:, [n]], "capsize": 3, "alpha": 0.7}
        axis.errorbar(row.clean, row.robust, **bars, fmt="none", color=look.color)
        style = {"color": look.color, "marker": look.marker, "label": f"{method}: {or_dash(row.average)}", "zorder": 3}
        axis.scatter(row.clean, row.robust, area(row.average), **style)
        for source, theirs in published.items():
            for there in theirs[theirs.index == method].itertuples():
                axis.scatter(there.clean, there.robust, area(there.average), marker=look.marker, **PUBLISHED[source])
                axis.plot([row.clean, there.clean], [row.robust, there.robust], color="grey", lw=0.7, zorder=0)
    for kind, limit in (("clean", axis.set_xlim), ("robust", axis.set_ylim)):
        ends = pd.concat([every[kind], table[kind] - reach[kind][0], table[kind] + reach[kind][1]])
        if ends.notna().any():
            limit(max(-2, ends.min() - 3), min(102, ends.max() + 3))  # so that whiskers end, and markers fit, within
    axis.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)")
    _equal_averages(axis)
    for source in published:
        axis.scatter([], [], label=f"{source}'s", **PUBLISHED[source])
    legend = axis.legend(title="average (%), area", loc="center left", bbox_to_anchor=(1.06, 0.5), fontsize=9)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([60])  # areas of the largest would push the lines of the legend apart
    return headed(figure, title, caption, of_each(table))


def between_0_and_100(mean: pd.Series, half: pd.Series) -> list[pd.Series]:
    """How far error bars reach to either side of ``mean``, in percent."""
    return [half.fillna(0).clip(upper=room) for room in (mean, 100 - mean)]


@drawn
def sources(table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Accuracy of each method as each source has it, a panel for clean images and for each attack; a line joins them.

    The number is UCAT's minus the paper's, in points. ``table``: published.beside; our 95 % intervals: error bars.
    """
    size = 13, 0.4 * len(table) + 2
    figure, axes = plt.subplots(1, 4, figsize=size, sharex=True, sharey=True, layout="constrained")
    y, numbers = np.arange(len(table)), []
    for axis, kind in zip(axes, ("clean", "PGD", "CW", "AutoAttack")):
        there = table[kind].reindex(columns=["UCAT", "paper", "ours", "ours ±"]).astype(float)
        ends = there[["UCAT", "paper", "ours"]].agg(["min", "max"], axis=1)
        axis.hlines(y, *ends.T.to_numpy(), color="grey", lw=1.5, zorder=1)
        for source, marker in (("UCAT", "s"), ("paper", "o")):
            axis.scatter(there[source], y, 55, marker=marker, label=f"{source}'s", zorder=2, **PUBLISHED[source])
        if "ours" in table[kind]:
            for line, look in zip(y, looks(table.index).values()):
                bars = {"xerr": there["ours ±"].iloc[line], "capsize": 3, "color": look.color, "fmt": look.marker}
                axis.errorbar(there.ours.iloc[line], line, **bars, label="ours" if line == 0 else None)
        for line, (end, gap) in enumerate(zip(ends["max"], there.UCAT - there.paper)):
            if not np.isnan(gap):
                axis.annotate(signed(gap), (end, line), (8, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set(title=kind if kind == "clean" else f"under {kind}", xlabel="top-1 accuracy (%)", xmargin=0.25)
        axis.set_xlim(left=0)
        axis.grid(visible=False, axis="y")
        both = there.dropna(subset=["UCAT", "paper"])
        numbers += [f"{kind}, {name}: paper {row.paper:.1f}, UCAT {row.UCAT:.1f}" for name, row in both.iterrows()]
    axes[0].set(yticks=y, yticklabels=table.index, ylim=(len(table) - 0.5, -0.5))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return headed(figure, title, caption, "; ".join(numbers))


def _equal_averages(axis: Axes) -> None:
    """A grey line through all points of an average, every five points."""
    (_, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for average in range(5, 100, 5):
        axis.axline((average, average), slope=-1, color="grey", lw=0.7, alpha=0.5, zorder=0)
        if bottom < 2 * average - right < top:
            axis.text(right, 2 * average - right, f" {average}", color="grey", fontsize=8, va="center")
    axis.plot([], [], color="grey", lw=0.7, alpha=0.5, label="equal average")


@drawn
def difference_matrix(differences: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Row minus column, robust above clean, with half the interval; bold where it leaves out zero.

    ``differences``: tables.differences.
    """
    methods = list(dict.fromkeys(differences.method))
    n = len(methods)
    size = max(6.5, 0.78 * n + 2.6), max(5.0, 2 * (0.5 * n + 0.6) + 1.4)
    figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    cells = {"fmt": "", "annot_kws": {"size": 8}, "linewidths": 0.5, "mask": np.eye(n, dtype=bool)}
    numbers = []
    for axis, kind in zip(axes, ("robust", "clean")):
        pairs = differences[differences.kind == kind].pivot(index="method", columns="other")
        difference, low, high = (pairs[name].loc[methods, methods] for name in ("difference", "low", "high"))
        texts = difference.map(signed) + "\n±" + ((high - low) / 2).map(or_dash)
        most = max(1.0, float(difference.abs().max().fillna(0).max()))
        colours = {"cmap": "vlag", "vmin": -most, "vmax": most, "cbar_kws": {"label": "percentage points"}}
        sns.heatmap(difference, annot=texts, ax=axis, **cells, **colours)
        clear = (low > 0) | (high < 0)
        for text in axis.texts:
            column, row = (int(place) for place in text.get_position())
            text.set_fontweight("bold" if clear.iloc[row, column] else "normal")
        axis.set(title=f"{kind} accuracy: row minus column", xlabel="", ylabel="")
        axis.grid(visible=False)
        _names_upright(axis)
        best = [f"{methods[0]} minus {other} {signed(difference.loc[methods[0], other])}" for other in methods[1:]]
        numbers.append(
            f"{kind}: {int(clear.to_numpy().sum()) // 2} of {n * (n - 1) // 2} pairs differ; {', '.join(best)}"
        )
    return headed(figure, title, caption, "; ".join(numbers))
