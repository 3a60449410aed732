"""The workbook's figures. Each function takes plain frames or arrays and returns a matplotlib Figure."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from tgazsr_utils.core.attention import resize
from tgazsr_utils.durable.files import write_atomic

STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "h")

sns.set_theme(
    style="whitegrid",
    palette="colorblind",
    context="notebook",
    rc={"figure.dpi": 100, "svg.hashsalt": "tgazsr", "text.parse_math": False},
)  # a class name may hold dollars


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Writes ``<folder>/figures/<name>.png`` and ``.svg``; gives the figure back for display."""
    for suffix in ("png", "svg"):
        path = folder / "figures" / f"{name}.{suffix}"
        write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight"))
    plt.close(figure)
    return figure


def attention_panels(
    images: Tensor,
    clean: Tensor,
    adversarial: Tensor,
    attacked: Tensor,
    captions: Sequence[tuple[str, str]],
    title: str,
) -> Figure:
    """One row an image: image, clean attention, perturbation (amplified), attacked attention.

    ``images`` and ``adversarial`` ``[N,3,H,W]`` in [0,1]; ``clean`` and ``attacked`` maps ``[N,h,w]`` in [0,1];
    ``captions``: a label for the clean and for the attacked side of each row.
    """
    size = tuple(images.shape[-2:])
    delta = adversarial - images
    factor = max(1, round(0.5 / max(float(delta.abs().max()), 1e-6)))
    n = len(images)
    figure, axes = plt.subplots(n, 4, figsize=(9.2, 2.35 * n + 0.6), squeeze=False, layout="constrained")
    clean, attacked = resize(clean, size), resize(attacked, size)
    heads = ("image", "attention, clean", f"perturbation x{factor}", "attention, attacked")
    for row, (before, after) in enumerate(captions):
        picture = images[row].permute(1, 2, 0).cpu().numpy()
        axes[row, 0].imshow(picture)
        _overlay(axes[row, 1], picture, clean[row])
        axes[row, 2].imshow((0.5 + factor * delta[row]).clamp(0, 1).permute(1, 2, 0).cpu().numpy())
        heat = _overlay(axes[row, 3], adversarial[row].permute(1, 2, 0).cpu().numpy(), attacked[row])
        axes[row, 0].set_xlabel(before, fontsize=9)
        axes[row, 3].set_xlabel(after, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    for axis, head in zip(axes[0], heads):
        axis.set_title(head, fontsize=10)
    figure.colorbar(heat, ax=axes[:, 3], shrink=min(1.0, 2.0 / n), label="attention (0 to 1)")
    figure.suptitle(title, fontsize=12)
    return figure


def _overlay(axis, picture: np.ndarray, attention: Tensor):
    axis.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
    return axis.imshow(attention.cpu().numpy(), cmap="viridis", alpha=0.65, vmin=0, vmax=1)


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
    for key, row in table.iterrows():
        style = (
            {"color": "black", "lw": 3, "marker": "o", "label": "mean"} if key == "MEAN" else {"lw": 1.2, "alpha": 0.6}
        )
        if key != "MEAN" and len(table) <= len(MARKERS):  # more sets than that cannot be told apart
            style |= {"label": key, "marker": next(markers), "ms": 4}
        axis.plot(eps, row.to_numpy(), **style)
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
    for axis, (column, label) in zip(axes, _SHIFT_LABELS.items()):
        sns.lineplot(
            frame,
            x="eps_255",
            y=column,
            hue="model",
            style="model",
            markers=True,
            dashes=False,
            err_style="bars",
            seed=0,
            ax=axis,
            legend="auto" if axis is axes[0] else False,
        )
        axis.set(xlabel="epsilon (1/255)", ylabel=label, xticks=sorted(frame.eps_255.unique()))
    figure.suptitle(title)
    return figure


def auc_interval(flipped: np.ndarray, score: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """ROC AUC of ``score`` for ``flipped`` (bool), with its 95 % bootstrap interval; NaN if one class is missing."""
    if flipped.all() or not flipped.any():
        return float("nan"), float("nan"), float("nan")
    rng = np.random.default_rng(0)
    values = []
    while len(values) < draws:
        rows = rng.integers(len(flipped), size=len(flipped))
        if 0 < flipped[rows].sum() < len(rows):
            values.append(roc_auc_score(flipped[rows], score[rows]))
    return float(roc_auc_score(flipped, score)), *map(float, np.quantile(values, [0.025, 0.975]))


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


def energy_inside(frame: pd.DataFrame, region: str, title: str) -> Figure:
    """Share of attention inside the object's ``region`` ("mask" or "box"), a pair of boxes a model; the line is chance."""
    sides = {"energy_clean": "clean", "energy_adv": "attacked"}
    tall = frame.rename(columns=sides).melt(["model"], list(sides.values()), "images", "energy")
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    sns.boxplot(tall, x="model", y="energy", hue="images", ax=axis, fliersize=2, gap=0.1)
    for patch, hatch in zip(axis.patches, [""] * frame.model.nunique() + ["//"] * frame.model.nunique()):
        patch.set_hatch(hatch)
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
    """Clean and robust accuracy of each method on one set, with Wilson intervals; ``frame``: results.to_frame."""
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
    """Accuracy by method and set, robust above clean, mean over seeds, blank where one is not counted; ``frame``: results.to_frame."""
    methods, sets = list(dict.fromkeys(frame.method)), list(dict.fromkeys(frame.dataset))
    whole = frame.groupby(["method", "kind"]).seed.transform("nunique") == frame.groupby("method").seed.transform(
        "nunique"
    )
    figure, axes = plt.subplots(2, 1, figsize=(0.72 * len(sets) + 3, 0.5 * len(methods) * 2 + 3), layout="constrained")
    for axis, kind in zip(axes, ("robust", "clean")):
        table = frame[whole & (frame.kind == kind)].pivot_table(index="method", columns="dataset", values="accuracy")
        table = table.reindex(index=methods, columns=sets).assign(MEAN=lambda t: t.mean(axis=1))
        sns.heatmap(
            table,
            annot=True,
            fmt=".0f",
            cmap="viridis",
            vmin=0,
            vmax=100,
            ax=axis,
            annot_kws={"size": 9},
            cbar_kws={"label": "top-1 (%)"},
            linewidths=0.5,
        )
        axis.set(title=f"{kind} accuracy (%)", xlabel="", ylabel="")
        plt.setp(axis.get_yticklabels(), rotation=0)
    axes[0].set_xticklabels([])
    plt.setp(axes[1].get_xticklabels(), rotation=35, ha="right")
    figure.suptitle(_wrapped(title, figure))
    return figure


def trade_off(table: pd.DataFrame, title: str, published: pd.DataFrame | None = None) -> Figure:
    """Robust against clean accuracy, a point a method, its area the average; grey lines join equal averages.

    ``table``: results.leaderboard, whose 95 % intervals become error bars; ``published``: the published table, in grey.
    """
    figure, axis = plt.subplots(figsize=(8.2, 5.2), layout="constrained")
    every = pd.concat([table, published]) if published is not None else table
    largest = every.average.max()
    size = lambda average: 60 if np.isnan(average) else 260 * max(average, 0) / largest  # in square points
    for color, marker, (method, row) in zip(cycle(sns.color_palette()), cycle(MARKERS), table.iterrows()):
        axis.errorbar(
            row.clean,
            row.robust,
            xerr=_or_none(row.clean_ci),
            yerr=_or_none(row.robust_ci),
            fmt="none",
            color=color,
            capsize=3,
            alpha=0.7,
        )
        axis.scatter(
            row.clean,
            row.robust,
            size(row.average),
            color=color,
            marker=marker,
            label=f"{method}: {_or_dash(row.average, '.1f')}",
            zorder=3,
        )
        if published is not None and method in published.index:
            there = published.loc[method]
            axis.scatter(there.clean, there.robust, size(there.average), color="grey", marker=marker, alpha=0.6)
            axis.plot([row.clean, there.clean], [row.robust, there.robust], color="grey", lw=0.7)
    x_limits = max(0, every.clean.min() - 6), min(100, every.clean.max() + 6)
    y_limits = (max(0, every.robust.min() - 6), every.robust.max() + 6) if every.robust.notna().any() else (0, 100)
    for average in range(5, 100, 5):
        axis.plot(x_limits, [2 * average - x for x in x_limits], color="grey", lw=0.7, alpha=0.5, zorder=0)
        y = 2 * average - x_limits[1]
        if y_limits[0] < y < y_limits[1]:
            axis.text(x_limits[1], y, f" {average}", color="grey", fontsize=8, va="center")
    axis.plot([], [], color="grey", lw=0.7, alpha=0.5, label="equal average")
    if published is not None:
        axis.scatter([], [], color="grey", alpha=0.6, label="published")
    axis.set(
        xlim=x_limits,
        ylim=y_limits,
        xlabel="clean accuracy (%)",
        ylabel="robust accuracy (%)",
        title=_wrapped(title, figure),
    )
    # Markers of one size, since areas of the largest would push the lines of the legend apart.
    legend = axis.legend(title="average (%), area", loc="center left", bbox_to_anchor=(1.04, 0.5), fontsize=9)
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([60])
    return figure


def difference_matrix(differences: pd.DataFrame, title: str) -> Figure:
    """Row minus column, robust left and clean right, with half the interval; bold where it leaves out zero.

    ``differences``: results.differences.
    """
    methods = list(dict.fromkeys(differences.method))
    n = len(methods)
    figure, axes = plt.subplots(
        1, 2, figsize=(2 * (0.82 * n + 1.2) + 0.6, 0.62 * n + 2), sharey=True, layout="constrained"
    )
    for axis, kind in zip(axes, ("robust", "clean")):
        part = differences[differences.kind == kind]
        grid = part.pivot(index="method", columns="other", values="difference").loc[methods, methods]
        largest = max(1.0, float(grid.abs().max().fillna(0).max()))
        sns.heatmap(
            grid,
            cmap="vlag",
            vmin=-largest,
            vmax=largest,
            ax=axis,
            linewidths=0.5,
            cbar_kws={"label": "points"},
            mask=np.eye(n, dtype=bool),
        )
        for row in part[(part.method != part.other) & part.difference.notna()].itertuples():
            y, x = methods.index(row.method), methods.index(row.other)
            clear = row.low > 0 or row.high < 0
            color = "white" if abs(row.difference) > 0.6 * largest else "black"
            axis.text(
                x + 0.5,
                y + 0.5,
                f"{row.difference:+.1f}\n±{(row.high - row.low) / 2:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color=color,
                fontweight="bold" if clear else "normal",
            )
        axis.set(title=f"{kind} accuracy: row minus column", xlabel="", ylabel="")
        plt.setp(axis.get_xticklabels(), rotation=35, ha="right")
        plt.setp(axis.get_yticklabels(), rotation=0)
    figure.suptitle(_wrapped(title, figure))
    return figure


def _wrapped(title: str, figure: Figure) -> str:
    return textwrap.fill(title, int(9 * figure.get_figwidth()))


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def ablation(
    table: pd.DataFrame, seeds: pd.DataFrame, title: str, kinds: Sequence[str] = ("robust", "clean", "average")
) -> Figure:
    """One panel a kind of accuracy, one line a variant: its mean with its 95 % interval, and a small point a seed.

    ``table`` and ``seeds``: ablations.table and ablations.by_seed. With two columns to the index, the last one is along the
    axis and the first one has a marker of its own.
    """
    names = list(table.index.names)
    rows = list(dict.fromkeys(table.index.get_level_values(-1)))
    groups = list(dict.fromkeys(table.index.get_level_values(0))) if len(names) > 1 else [None]
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(max(7.5, 3.7 * len(kinds) + 2), 0.42 * len(rows) * max(1, 0.6 * len(groups)) + 1.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    several = seeds.groupby(names, sort=False).size().max() > 1
    for axis, kind in zip(axes[0], kinds):
        for g, (group, marker) in enumerate(zip(groups, cycle(MARKERS))):
            part = table if group is None else table.xs(group, level=0)
            own = seeds if group is None else seeds[seeds[names[0]] == group]
            shift = 0.0 if group is None else 0.5 * ((g + 0.5) / len(groups) - 0.5)
            y = np.array([rows.index(row) + shift for row in part.index])
            color = sns.color_palette()[g % len(sns.color_palette())]
            axis.errorbar(
                part[kind], y, xerr=part[f"{kind}_ci"].fillna(0), fmt=marker, ms=7, capsize=3, label=group, color=color
            )
            if several:
                spots = [rows.index(row) + shift for row in own[names[-1]]]
                axis.plot(own[kind], spots, "o", ms=3, color="black", alpha=0.5, zorder=4)
        axis.set(xlabel=f"{kind} accuracy (%)", yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
    if groups != [None]:
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(_wrapped(title, figure))
    return figure


def alpha_beta(table: pd.DataFrame, title: str, mark: Mapping[str, float] | None = None) -> Figure:
    """Robust, clean and average accuracy over Alpha and Beta; only measured points are filled. ``table``: ablations.table.

    ``mark``: where "Alpha" and "Beta" are to be marked by a ring, counted in steps of the measured grid.
    """
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axis, kind in zip(axes, ("robust", "clean", "average")):
        grid = (
            table.reset_index()
            .pivot_table(index="Alpha", columns="Beta", values=kind, dropna=False)
            .sort_index(ascending=False)
        )
        sns.heatmap(
            grid, annot=True, fmt=".1f", cmap="viridis", ax=axis, linewidths=0.5, cbar_kws={"label": f"{kind} (%)"}
        )
        plt.setp(axis.get_yticklabels(), rotation=0)
        axis.set(
            title=f"{kind} accuracy (%)",
            xlabel="Beta (weight of L_AMC)",
            ylabel="Alpha (weight of L_AR)",
            facecolor="0.92",
        )
        axis.grid(False)
        if mark:
            axis.plot(
                mark["Beta"] + 0.5,
                len(grid) - 0.5 - mark["Alpha"],
                marker="o",
                mfc="none",
                mec="crimson",
                ms=40,
                mew=2.5,
            )
    figure.suptitle(_wrapped(title, figure))
    return figure


def loss_mixture(table: pd.DataFrame, cosines: Mapping[str, float]) -> Figure:
    """Weighted terms of a loss and their gradients' norms, and the cosines between gradients. ``table``: explorer.mix."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=[1, 1, 1.1])
    terms = table.drop("sum")
    for axis, column, label in zip(axes, ("weighted", "gradient"), ("weighted term", "norm of its gradient, weighted")):
        bars = axis.barh(terms.index, terms[column], color=sns.color_palette()[:3])
        axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
        axis.set(xlabel=label, title=f"sum: {table.loc['sum', column]:.3f}")
        axis.margins(x=0.2)
    between = [f"{pair}: {_or_dash(value)}" for pair, value in cosines.items()]
    with_sum = [f"{name}, sum: {_or_dash(value)}" for name, value in terms.cosine.items()]
    weights = ", ".join(f"{name} {value:g}" for name, value in terms.weight.items())
    axes[2].axis("off")
    axes[2].text(
        0,
        0.95,
        "\n".join([f"Weights: {weights}", "", "Cosines between gradients", *between, *with_sum]),
        va="top",
        linespacing=1.5,
    )
    for axis in axes[:2]:
        axis.invert_yaxis()
        axis.grid(False, axis="y")
    return figure


def _or_dash(value: float, format_spec: str = "+.2f") -> str:
    return "–" if np.isnan(value) else f"{value:{format_spec}}"


def budgets(table: pd.DataFrame, title: str) -> Figure:
    """Robust accuracy against the test's epsilon, a line a training epsilon, and against its steps, a line a number of
    training steps. ``table``: that of ablations.epsilon."""
    frame = table.reset_index()
    base = frame.iloc[0]
    panels = (
        (
            "test_eps",
            "train_eps",
            "test epsilon (1/255)",
            "trained at {:g}/255",
            frame.test_numsteps == base.test_numsteps,
        ),
        (
            "test_numsteps",
            "train_numsteps",
            "PGD steps of the test",
            "trained with {:g} steps",
            frame.test_eps == base.test_eps,
        ),
    )
    other = {"train_eps": "train_numsteps", "train_numsteps": "train_eps"}
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
    for axis, (x, hue, label, legend, chosen) in zip(axes, panels):
        part = frame[chosen & (frame[other[hue]] == base[other[hue]])]
        for style, marker, (value, line) in zip(cycle(STYLES), cycle(MARKERS), part.groupby(hue, sort=False)):
            line = line.sort_values(x)
            name = value if isinstance(value, str) else legend.format(value)
            axis.errorbar(
                line[x], line.robust, yerr=line.robust_ci.fillna(0), fmt=marker, ls=style, capsize=3, label=name
            )
        axis.set(xlabel=label, ylabel="robust accuracy (%)", xticks=sorted(part[x].unique()), ylim=(0, None))
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
    return ablation(table, seeds, title, ("robust",) if name == "attacks" else ("robust", "clean", "average"))
