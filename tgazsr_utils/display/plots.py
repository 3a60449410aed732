"""The workbook's figures. Each function takes plain frames or arrays and returns a matplotlib Figure."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.stats import rankdata
from sklearn.metrics import roc_curve
from torch import Tensor

from tgazsr_utils.datasets.published_sets import in_means
from tgazsr_utils.display.panels import amplification, attention_pictures
from tgazsr_utils.durable.files import write_atomic
from tgazsr_utils.measuring.recorded_sweep import KINDS

STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "h")

_RC = {"figure.dpi": 100, "svg.hashsalt": "tgazsr", "text.parse_math": False}  # a class name may hold dollars
sns.set_theme(style="whitegrid", palette="colorblind", rc=_RC)


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Writes ``<folder>/figures/<name>.png`` and ``.svg``; gives the figure back for display."""
    for suffix in ("png", "svg"):
        path = folder / "figures" / f"{name}.{suffix}"
        write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))
    plt.close(figure)
    return figure


def attention_panels(
    images: Tensor, clean: Tensor, adversarial: Tensor, attacked: Tensor, captions: list[tuple[str, str]], title: str
) -> Figure:
    """One row an image: image, clean attention, perturbation (amplified), attacked attention.

    ``images`` and ``adversarial`` ``[N,3,H,W]`` in [0,1]; ``clean`` and ``attacked`` maps ``[N,h,w]`` in [0,1];
    ``captions``: a label for the clean and for the attacked side of each row.
    """
    n, factor = len(images), amplification(images, adversarial)
    figure, axes = plt.subplots(n, 4, figsize=(9.2, 2.35 * n + 0.6), squeeze=False, layout="constrained")
    for line, (before, after), *row in zip(axes, captions, images, clean, adversarial, attacked):
        pictures = attention_pictures(*row, factor)
        for axis, picture in zip(line, pictures.values()):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        line[0].set_xlabel(before, fontsize=9)
        line[3].set_xlabel(after, fontsize=9)
    for axis, head in zip(axes[0], pictures):
        axis.set_title(head, fontsize=10)
    heat = ScalarMappable(Normalize(0, 1), "viridis")
    figure.colorbar(heat, ax=axes[:, 3], shrink=min(1.0, 2.0 / n), label="attention (0 to 1)", alpha=0.65)
    figure.suptitle(title, fontsize=12)
    return figure


def captioned_images(images: Tensor, captions: Sequence[str], title: str, columns: int = 6) -> Figure:
    """A grid of images ``[N,3,H,W]`` (uint8) with their captions."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        axis.imshow(image.permute(1, 2, 0).cpu().numpy())
        axis.set_title("\n".join(textwrap.wrap(caption, 24)), fontsize=8)
    figure.suptitle(title)
    return figure


def pretraining_curve(history: pd.DataFrame, title: str) -> Figure:
    """Contrastive loss against the step, as measured and as a running mean of 50 steps."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axis.plot(history.step, history.loss, alpha=0.3, lw=0.8, label="each step")
    axis.plot(history.step, history.loss.rolling(50, min_periods=1).mean(), label="mean of 50")
    axis.set(xlabel="step", ylabel="contrastive loss (nats)", title=title)
    axis.legend()
    return figure


def fragility(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy against epsilon, a thin line a set and a thick one for the mean; columns "clean" and "eps E"."""
    eps, markers = [0.0, *(float(c.removeprefix("eps ")) for c in table.columns[1:])], cycle(MARKERS)
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for key, row in table.drop("MEAN").iterrows():
        told_apart = {"label": key, "marker": next(markers), "ms": 4} if len(table) <= len(MARKERS) else {}
        axis.plot(eps, row.to_numpy(), lw=1.2, alpha=0.6, **told_apart)
    axis.plot(eps, table.loc["MEAN"].to_numpy(), color="black", lw=3, marker="o", label="mean")
    axis.axhline(table.loc["MEAN", "clean"] / 4, color="grey", ls=":", label="a quarter of the clean mean")
    axis.set(xlabel="epsilon (1/255)", ylabel="top-1 accuracy (%)", ylim=(0, 100), title=title)
    axis.legend(fontsize=9)
    return figure


_SHIFT_LABELS = {
    "l2": "l2 distance of the maps",
    "cosine": "cosine similarity of the maps",
    "iou_top20": "overlap (IoU) of the top fifth",
    "centre_move": "centre-of-mass move (patches)",
}


def shift_against_eps(frame: pd.DataFrame, title: str) -> Figure:
    """Mean of each shift measure against epsilon, one line a model; bars are 95 % bootstrap intervals over images."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    lines = {"hue": "model", "style": "model", "markers": True, "dashes": False, "err_style": "bars", "seed": 0}
    for axis, (column, label) in zip(axes, _SHIFT_LABELS.items()):
        legend = "auto" if axis is axes[0] else False
        sns.lineplot(frame, x="eps_255", y=column, ax=axis, legend=legend, **lines)
        axis.set(xlabel="epsilon (1/255)", ylabel=label, xticks=sorted(frame.eps_255.unique()))
    figure.suptitle(title)
    return figure


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
    ranks = (rankdata(score, axis=1) * flipped).sum(1)
    return (ranks - ones * (ones + 1) / 2) / (ones * (flipped.shape[1] - ones))


def flip_roc(frame: pd.DataFrame, title: str) -> Figure:
    """ROC of "attention moved by more than t" as a sign that the prediction flipped, among images right when clean."""
    figure, axis = plt.subplots(figsize=(5.4, 5), layout="constrained")
    for style, (model, part) in zip(cycle(STYLES), frame[frame.clean_correct].groupby("model", sort=False)):
        auc, low, high = auc_interval(part.flipped.to_numpy(), part.l2.to_numpy())
        if np.isnan(auc):
            axis.plot([], [], style, label=f"{model}: all alike, no AUC")
            continue
        false_rate, true_rate, _ = roc_curve(part.flipped, part.l2)
        axis.plot(false_rate, true_rate, style, lw=2, label=f"{model}: AUC {auc:.2f} [{low:.2f}, {high:.2f}]")
    axis.plot([0, 1], [0, 1], color="grey", lw=1)
    axis.set(xlabel="false positive rate", ylabel="true positive rate", title=title, aspect="equal")
    axis.legend(title="shift predicts the flip", loc="lower right", fontsize=9)
    return figure


def energy_boxes(frame: pd.DataFrame, region: str, title: str) -> Figure:
    """Share of attention inside the object's ``region`` ("mask" or "box"), two boxes a model; the line is chance."""
    sides = {"energy_clean": "clean", "energy_adv": "attacked"}
    tall = frame.rename(columns=sides).melt(["model"], list(sides.values()), "images", "energy")
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    sns.boxplot(tall, x="model", y="energy", hue="images", ax=axis, fliersize=2, gap=0.1)
    n = frame.model.nunique()
    for patch in [*axis.patches[n : 2 * n], axis.patches[-1]]:  # attacked: boxes, and in the legend
        patch.set_hatch("//")
    axis.axhline(frame.energy_uniform.mean(), color="black", ls=":", label="spread evenly")
    axis.set(xlabel="", ylabel=f"share of attention inside the object's {region}", title=title, ylim=(0, None))
    axis.legend(title="", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def loss_terms(histories: dict[str, pd.DataFrame], title: str) -> Figure:
    """Unweighted loss terms and batch accuracy under attack against the step, a method a line, running means of 10."""
    names = list(dict.fromkeys(c for h in histories.values() for c in h if c == "CE" or c.startswith("L_")))
    labels = {"CE": "cross-entropy, attacked images"}
    figure, axes = plt.subplots(1, len(names) + 1, figsize=(3.6 * (len(names) + 1), 3.6), layout="constrained")
    for style, (method, history) in zip(cycle(STYLES), histories.items()):
        smooth = history.rolling(10, min_periods=1).mean()
        for axis, name in zip(axes, names):
            if name in history:
                axis.plot(history.step, smooth[name], style, label=method)
        axes[-1].plot(history.step, 100 * smooth.robust_batch_accuracy, style, label=method)
    for axis, name in zip(axes, [*(labels.get(n, n) for n in names), "batch accuracy under attack (%)"]):
        axis.set(xlabel="step", ylabel=name)
    axes[0].legend()
    figure.suptitle(title)
    return figure


def accuracy_bars(frame: pd.DataFrame, title: str) -> Figure:
    """Clean and robust accuracy of each method on one set, with Wilson intervals; ``frame``: tables.to_frame."""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    methods = list(dict.fromkeys(frame.method))
    for shift, (kind, hatch) in zip((-0.2, 0.2), (("clean", ""), ("robust", "//"))):
        part = frame[frame.kind == kind].set_index("method").reindex(methods)
        error = [part.accuracy - part.low, part.high - part.accuracy]
        error = [side.clip(lower=0) for side in error]  # rounding at 0 and 100 %
        axis.bar(np.arange(len(methods)) + shift, part.accuracy, 0.38, yerr=error, hatch=hatch, label=kind, capsize=3)
    axis.set(xticks=range(len(methods)), xticklabels=methods, ylabel="top-1 accuracy (%)", ylim=(0, 100), title=title)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def accuracy_heatmap(frame: pd.DataFrame, title: str) -> Figure:
    """Accuracy by method and set, robust above clean, mean over seeds; blank where not all seeds are counted.

    ``frame``: tables.to_frame.
    """
    methods, sets = list(dict.fromkeys(frame.method)), list(dict.fromkeys(frame.dataset))
    counted = frame.groupby(["method", "kind"]).seed.transform("nunique")
    whole = frame[counted == frame.groupby("method").seed.transform("nunique")]
    figure, axes = plt.subplots(2, 1, figsize=(0.72 * len(sets) + 3, len(methods) + 3), layout="constrained")
    cells = {"annot": True, "fmt": ".0f", "annot_kws": {"size": 9}, "linewidths": 0.5}
    for axis, kind in zip(axes, ("robust", "clean")):
        table = whole[whole.kind == kind].pivot_table(index="method", columns="dataset", values="accuracy")
        table = table.reindex(index=methods, columns=sets)
        table["MEAN"] = table[in_means(sets)].mean(axis=1)
        sns.heatmap(table, cmap="viridis", vmin=0, vmax=100, ax=axis, cbar_kws={"label": "top-1 (%)"}, **cells)
        axis.set(title=f"{kind} accuracy (%)", xlabel="", ylabel="")
        _names_upright(axis)
    axes[0].set_xticklabels([])
    figure.suptitle(_wrapped(title, figure))
    return figure


def _names_upright(axis: Axes) -> None:
    """Names of rows lie, and those of columns lean, so that long ones can be read."""
    plt.setp(axis.get_xticklabels(), rotation=35, ha="right")
    plt.setp(axis.get_yticklabels(), rotation=0)


_SOURCES = {  # of numbers: published ones are hollow, those of others filled, both grey
    "paper": {"facecolors": "none", "edgecolors": "0.3", "linewidths": 1.5},
    "UCAT": {"facecolors": "0.6", "edgecolors": "0.6"},
}


def trade_off(table: pd.DataFrame, title: str, published: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """Robust against clean accuracy, a point a method, its area the average; grey lines join equal averages.

    ``table``: tables.leaderboard, whose 95 % intervals become error bars; ``published``: published.points, whose points
    are grey and joined to ours.
    """
    figure, axis = plt.subplots(figsize=(8.2, 5.2), layout="constrained")
    published = published or {}
    every = pd.concat([table, *published.values()])
    largest = every.average.max()
    area = lambda average: 60 if np.isnan(average) else 260 * max(average, 0) / largest  # square points
    for color, marker, (method, row) in zip(cycle(sns.color_palette()), cycle(MARKERS), table.iterrows()):
        bars = {"xerr": row.clean_ci, "yerr": row.robust_ci, "capsize": 3, "alpha": 0.7}
        axis.errorbar(row.clean, row.robust, **bars, fmt="none", color=color)
        style = {"color": color, "marker": marker, "label": f"{method}: {_or_dash(row.average)}", "zorder": 3}
        axis.scatter(row.clean, row.robust, area(row.average), **style)
        for source, theirs in published.items():
            for there in theirs[theirs.index == method].itertuples():
                axis.scatter(there.clean, there.robust, area(there.average), marker=marker, **_SOURCES[source])
                axis.plot([row.clean, there.clean], [row.robust, there.robust], color="grey", lw=0.7, zorder=0)
    top = min(100, every.robust.max() + 6) if every.robust.notna().any() else 100
    bottom = max(0, every.robust.min() - 6) if every.robust.notna().any() else 0
    axis.set(xlim=(max(0, every.clean.min() - 6), min(100, every.clean.max() + 6)), ylim=(bottom, top))
    axis.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)", title=_wrapped(title, figure))
    _equal_averages(axis)
    for source in published:
        axis.scatter([], [], label=f"{source}'s", **_SOURCES[source])
    legend = axis.legend(title="average (%), area", loc="center left", bbox_to_anchor=(1.04, 0.5), fontsize=9)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([60])  # areas of the largest would push the lines of the legend apart
    return figure


def sources(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy of each method as each source has it, a panel for clean images and for each attack; a line joins them.

    ``table``: published.beside; our 95 % intervals become error bars.
    """
    size = 13, 0.4 * len(table) + 1.8
    figure, axes = plt.subplots(1, 4, figsize=size, sharex=True, sharey=True, layout="constrained")
    y = np.arange(len(table))
    for axis, kind in zip(axes, ("clean", "PGD", "CW", "AutoAttack")):
        there = table[kind].reindex(columns=["UCAT", "paper", "ours", "ours ±"]).astype(float)
        ends = there[["UCAT", "paper", "ours"]].agg(["min", "max"], axis=1)
        axis.hlines(y, *ends.T.to_numpy(), color="grey", lw=1.5, zorder=1)
        for source, marker in (("UCAT", "s"), ("paper", "o")):
            axis.scatter(there[source], y, 55, marker=marker, label=f"{source}'s", zorder=2, **_SOURCES[source])
        if "ours" in table[kind]:
            bars = {"xerr": there["ours ±"], "capsize": 3, "color": sns.color_palette()[1]}
            axis.errorbar(there.ours, y, fmt="D", label="ours", **bars)
        for line, (end, gap) in enumerate(zip(ends["max"], there.UCAT - there.paper)):
            if not np.isnan(gap):
                axis.annotate(f"{gap:+.1f}", (end, line), (8, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set(title=kind if kind == "clean" else f"under {kind}", xmargin=0.2)
        axis.grid(visible=False, axis="y")
    axes[0].set(yticks=y, yticklabels=table.index, ylim=(len(table) - 0.5, -0.5))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.supxlabel("top-1 accuracy (%); the number is UCAT's minus the paper's, in points", fontsize=11)
    figure.suptitle(title)
    return figure


def _equal_averages(axis: Axes) -> None:
    """A grey line through all points of an average, every five points."""
    (_, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for average in range(5, 100, 5):
        axis.axline((average, average), slope=-1, color="grey", lw=0.7, alpha=0.5, zorder=0)
        if bottom < 2 * average - right < top:
            axis.text(right, 2 * average - right, f" {average}", color="grey", fontsize=8, va="center")
    axis.plot([], [], color="grey", lw=0.7, alpha=0.5, label="equal average")


def _or_dash(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def difference_matrix(differences: pd.DataFrame, title: str) -> Figure:
    """Row minus column, robust left and clean right, with half the interval; bold where it leaves out zero.

    ``differences``: tables.differences.
    """
    methods = list(dict.fromkeys(differences.method))
    n = len(methods)
    size = max(8.0, 2 * (0.82 * n + 1.2) + 0.6), 0.62 * n + 2
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    cells = {"fmt": "", "annot_kws": {"size": 8}, "linewidths": 0.5, "mask": np.eye(n, dtype=bool)}
    for axis, kind in zip(axes, ("robust", "clean")):
        pairs = differences[differences.kind == kind].pivot(index="method", columns="other")
        difference, low, high = (pairs[name].loc[methods, methods] for name in ("difference", "low", "high"))
        texts = difference.map("{:+.1f}".format) + "\n±" + ((high - low) / 2).map("{:.1f}".format)
        largest = max(1.0, float(difference.abs().max().fillna(0).max()))
        colours = {"cmap": "vlag", "vmin": -largest, "vmax": largest, "cbar_kws": {"label": "points"}}
        sns.heatmap(difference, annot=texts, ax=axis, **cells, **colours)
        clear = (low > 0) | (high < 0)
        for text in axis.texts:
            column, row = (int(place) for place in text.get_position())
            text.set_fontweight("bold" if clear.iloc[row, column] else "normal")
        axis.set(title=f"{kind} accuracy: row minus column", xlabel="", ylabel="")
        _names_upright(axis)
    figure.suptitle(_wrapped(title, figure))
    return figure


def _wrapped(title: str, figure: Figure) -> str:
    return textwrap.fill(title, int(9 * figure.get_figwidth()))


def ablation(table: pd.DataFrame, seeds: pd.DataFrame, title: str, kinds: Sequence[str] = KINDS) -> Figure:
    """One panel a kind of accuracy, one line a variant: its mean with its 95 % interval, and a small point a seed.

    ``table`` and ``seeds``: ablations.table and ablations.by_seed. With two columns to the index, the last one is along
    the axis and the first one has a marker of its own.
    """
    names = list(table.index.names)
    groups = list(dict.fromkeys(table.index.get_level_values(0))) if len(names) > 1 else [None]
    parts = [table if group is None else table.xs(group, level=0) for group in groups]
    longest_first = sorted((part.index.get_level_values(-1) for part in parts), key=len, reverse=True)
    rows = list(dict.fromkeys(row for part in longest_first for row in part))
    size = max(7.5, 3.7 * len(kinds) + 2), 0.42 * len(rows) * max(1, 0.45 * len(groups)) + 1.6
    figure, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
    several = seeds.groupby(names, sort=False).size().max() > 1
    for axis, kind in zip(axes[0], kinds):
        for g, (group, color, marker) in enumerate(zip(groups, cycle(sns.color_palette()), cycle(MARKERS))):
            means = parts[g]
            single = seeds if group is None else seeds[seeds[names[0]] == group]
            shift = 0.7 * ((g + 0.5) / len(groups) - 0.5)
            y = [rows.index(row) + shift for row in means.index]
            reach = means[f"{kind}_ci"].fillna(0)
            within = [np.minimum(reach, means[kind]), np.minimum(reach, 100 - means[kind])]  # 0 to 100
            axis.errorbar(means[kind], y, xerr=within, fmt=marker, ms=7, capsize=3, label=group, color=color)
            if several:
                y = [rows.index(row) + shift for row in single[names[-1]]]
                axis.plot(single[kind], y, "o", ms=3, color="black", alpha=0.5, zorder=4)
        axis.set(xlabel=f"{kind} accuracy (%)", yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    if groups != [None]:
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(_wrapped(title, figure))
    return figure


def alpha_beta(table: pd.DataFrame, title: str) -> Figure:
    """Robust, clean and average accuracy over Alpha and Beta; only measured points are filled.

    ``table``: ablations.table.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axis, kind in zip(axes, KINDS):
        grid = table.reset_index().pivot_table(index="Alpha", columns="Beta", values=kind, dropna=False)
        cells = {"annot": True, "fmt": ".1f", "linewidths": 0.5, "cbar_kws": {"label": f"{kind} (%)"}}
        sns.heatmap(grid.sort_index(ascending=False), cmap="viridis", ax=axis, **cells)
        plt.setp(axis.get_yticklabels(), rotation=0)
        axis.set(title=f"{kind} accuracy (%)", xlabel="Beta (weight of L_AMC)", ylabel="Alpha (weight of L_AR)")
        axis.set_facecolor("0.92")
        axis.grid(False)
    figure.suptitle(_wrapped(title, figure))
    return figure


def budgets(table: pd.DataFrame, title: str) -> Figure:
    """Robust accuracy against the test's epsilon, a line a training epsilon, and against its steps, a line a number of
    training steps. ``table``: that of ablations.epsilon."""
    frame = table.reset_index()
    eps = "test_eps", "train_eps", "trained at {:g}/255", "test epsilon (1/255)"
    steps = "test_numsteps", "train_numsteps", "trained with {:g} steps", "PGD steps of the test"
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
    for axis, (x, hue, legend, name), other in zip(axes, (eps, steps), (steps, eps)):
        fixed = list(other[:2])
        shown = frame[(frame[fixed] == frame[fixed].iloc[0]).all(axis=1)]
        for style, marker, (value, line) in zip(cycle(STYLES), cycle(MARKERS), shown.groupby(hue, sort=False)):
            line = line.sort_values(x)
            bars = {"yerr": line.robust_ci.fillna(0), "capsize": 3}
            label = value if isinstance(value, str) else legend.format(value)  # a string: the untuned model
            axis.errorbar(line[x], line.robust, fmt=marker, ls=style, label=label, **bars)
        axis.set(xlabel=name, ylabel="robust accuracy (%)", xticks=sorted(shown[x].unique()), ylim=(0, None))
        axis.legend(fontsize=9)
    figure.suptitle(_wrapped(title, figure))
    return figure


def of_ablation(name: str, table: pd.DataFrame, seeds: pd.DataFrame, title: str) -> Figure:
    """The figure of an ablation: a map over Alpha and Beta, curves over budgets, or a line a variant."""
    if name == "alpha_beta":
        return alpha_beta(table, title)
    title = f"{title[:-1]}; 95 % intervals over {' or '.join(table.interval.unique())})"
    if name == "epsilon":
        return budgets(table, title)
    return ablation(table, seeds, title, ("robust",) if name == "does_it_hold" else KINDS)
