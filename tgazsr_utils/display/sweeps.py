"""Figures of the ablations (notebooks 03 and 06): tables of ``measuring.ablations``, a line or a cell a variant."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tgazsr_utils.display.plots import MARKERS, STYLES, between_0_and_100
from tgazsr_utils.display.style import headed, looks, of_each, within
from tgazsr_utils.measuring.recorded_sweep import KINDS


def ablation(
    table: pd.DataFrame, seeds: pd.DataFrame, title: str, caption: str = "", kinds: Sequence[str] = KINDS
) -> Figure:
    """One panel a kind of accuracy, one line a variant: its mean with its 95 % interval, and a small point a seed.

    ``table`` and ``seeds``: ablations.table and ablations.by_seed. With two columns to the index, the last one is along
    the axis and the first one, a method or model, is told by its look; with one, a row has that of its method.
    """
    names = list(table.index.names)
    groups = list(dict.fromkeys(table.index.get_level_values(0))) if len(names) > 1 else [None]
    parts = [table if group is None else table.xs(group, level=0) for group in groups]
    longest_first = sorted((part.index.get_level_values(-1) for part in parts), key=len, reverse=True)
    rows = list(dict.fromkeys(row for part in longest_first for row in part))
    trains = dict(zip(seeds[names[-1]], seeds["method"]))
    style = looks(trains.values() if groups == [None] else groups)
    size = max(7.5, 3.5 * len(kinds) + 2), 0.42 * len(rows) * max(1, 0.45 * len(groups)) + 1.9
    figure, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
    several = seeds.groupby(names, sort=False).size().max() > 1
    for axis, kind in zip(axes[0], kinds):
        for g, group in enumerate(groups):
            means = parts[g]
            single = seeds if group is None else seeds[seeds[names[0]] == group]
            shift = 0.7 * ((g + 0.5) / len(groups) - 0.5)
            y = [rows.index(row) + shift for row in means.index]
            bars = between_0_and_100(means[kind], means[f"{kind}_ci"])
            for place, (row, mean), left, right in zip(y, means[kind].items(), *bars):
                look = style[trains[row] if group is None else group]
                drawn = {"fmt": look.marker, "color": look.color, "ms": 7, "capsize": 3}
                drawn["label"] = group if row == means.index[0] else None
                axis.errorbar(mean, place, xerr=[[left], [right]], **drawn)
            if several:
                y = [rows.index(row) + shift for row in single[names[-1]]]
                axis.plot(single[kind], y, "o", ms=3, color="black", alpha=0.5, zorder=4)
        axis.set(xlabel=f"{kind} accuracy (%)", yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
        axis.xaxis.set_major_locator(MaxNLocator(5))
    if groups != [None]:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return headed(figure, title, caption, of_each(table))


def alpha_beta(table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Robust, clean and average accuracy over Alpha and Beta, half their intervals; only what is measured is filled.

    ``table``: ablations.table.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    for axis, kind in zip(axes, KINDS):
        pivot = {"index": "Alpha", "columns": "Beta", "dropna": False}
        flat = table.reset_index()
        flat["cell"] = [within(*pair).replace(" ±", "\n±") for pair in zip(flat[kind], flat[f"{kind}_ci"])]
        values, cells = (
            flat.pivot_table(values=name, aggfunc="first", **pivot).sort_index(ascending=False)
            for name in (kind, "cell")
        )
        sns.heatmap(values, annot=cells, fmt="", cmap="viridis", linewidths=0.5, annot_kws={"size": 10}, ax=axis)
        plt.setp(axis.get_yticklabels(), rotation=0)
        axis.set(title=f"{kind} accuracy (%)", xlabel="Beta (weight of L_AMC)", ylabel="")
        axis.set_facecolor("0.92")
        axis.grid(False)
    axes[0].set_ylabel("Alpha (weight of L_AR)")
    named = table.set_axis([f"Alpha {a:g}, Beta {b:g}" for a, b in table.index])
    return headed(figure, title, caption, of_each(named))


def budgets(table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Robust accuracy against the test's epsilon, a line a training epsilon, and against its steps, a line a number of
    training steps. ``table``: that of ablations.epsilon."""
    frame = table.reset_index()
    eps = "test_eps", "train_eps", "trained at {:g}/255", "test epsilon (1/255)"
    steps = "test_numsteps", "train_numsteps", "trained with {:g} steps", "PGD steps of the test"
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.4), sharey=True, layout="constrained")
    numbers = []
    for axis, (x, hue, legend, name), other in zip(axes, (eps, steps), (steps, eps)):
        fixed = list(other[:2])
        shown = frame[(frame[fixed] == frame[fixed].iloc[0]).all(axis=1)]
        trained = [value for value in shown[hue].unique() if not isinstance(value, str)]
        base = looks(["TGA-ZSR"])["TGA-ZSR"].color
        ends = ["#F5A26B", base, "#6B2F00"] if len(trained) > 1 else [base, base]
        shades = iter(sns.blend_palette(ends, len(trained)))
        for style, marker, (value, line) in zip(cycle(STYLES), cycle(MARKERS[1:]), shown.groupby(hue, sort=False)):
            line = line.sort_values(x)
            label, color = legend, None
            if isinstance(value, str):  # the untuned model
                label, (color, marker, style) = value, looks([value])[value]
            else:
                label, color = legend.format(value), next(shades)
            bars = {"yerr": between_0_and_100(line.robust, line.robust_ci), "capsize": 3}
            axis.errorbar(line[x], line.robust, fmt=marker, ls=style, color=color, label=label, **bars)
            values = [f"{within(r.robust, r.robust_ci)} at {r[x]:g}" for _, r in line.iterrows()]
            numbers.append(f"{label}, by {name}: {', '.join(values)}")
        axis.set(xlabel=name, ylabel="robust accuracy (%)", xticks=sorted(shown[x].unique()), ylim=(0, None))
        axis.yaxis.set_tick_params(labelleft=True)
        axis.legend(fontsize=9)
    return headed(figure, title, caption, "; ".join(numbers))


def of_ablation(name: str, table: pd.DataFrame, seeds: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """The figure of an ablation: a map over Alpha and Beta, curves over budgets, or a line a variant."""
    title, _, more = title.partition("? ")
    title, caption = f"{title.rstrip('?')}?", "; ".join(part.rstrip(".") for part in (caption, more) if part)
    caption = f"{caption}; 95 % intervals over {' or '.join(table.interval.unique())}"
    if name == "alpha_beta":
        return alpha_beta(table, title, caption)
    if name == "epsilon":
        return budgets(table, title, caption)
    return ablation(table, seeds, title, caption, ("robust",) if name == "does_it_hold" else KINDS)
