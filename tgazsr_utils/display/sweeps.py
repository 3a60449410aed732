"""Figures of the ablations (notebooks 03 and 06): tables of ``measuring.ablations``, a line or a cell a variant."""

from collections.abc import Iterable
from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tgazsr_utils.display.plots import between_0_and_100
from tgazsr_utils.display.style import LOOKS, Look, drawn, headed, looks, of_each, within
from tgazsr_utils.measuring.recorded_sweep import KINDS


def ablation(table: pd.DataFrame, seeds: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """One panel a kind of accuracy, one line a variant: its mean with its 95 % interval, and a small point a seed.

    ``table`` and ``seeds``: ablations.table and ablations.by_seed. A line has the look of its method.
    """
    rows, name = list(table.index), table.index.name
    trains = dict(zip(seeds[name], seeds["method"]))
    style = looks(trains.values())
    size = 3.5 * len(KINDS) + 2, 0.42 * len(rows) + 1.9
    figure, axes = plt.subplots(1, len(KINDS), figsize=size, sharey=True, layout="constrained")
    several = seeds.groupby(name, sort=False).size().max() > 1
    for axis, kind in zip(axes, KINDS):
        bars = between_0_and_100(table[kind], table[f"{kind}_ci"])
        for y, (row, mean), left, right in zip(range(len(rows)), table[kind].items(), *bars):
            look = style[trains[row]]
            axis.errorbar(mean, y, xerr=[[left], [right]], fmt=look.marker, color=look.color, ms=7, capsize=3)
        if several:
            y = [rows.index(row) for row in seeds[name]]
            axis.plot(seeds[kind], y, "o", ms=3, color="black", alpha=0.5, zorder=4)
        axis.set(xlabel=f"{kind} accuracy (%)", yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
        axis.xaxis.set_major_locator(MaxNLocator(5))
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
        axis.set(yticklabels=[f"{a:g}" for a in values.index], xticklabels=[f"{b:g}" for b in values.columns])
        plt.setp(axis.get_yticklabels(), rotation=0)
        axis.set(title=f"{kind} accuracy (%)", xlabel="Beta (weight of L_AMC)", ylabel="")
        axis.set_facecolor("0.92")
        axis.grid(False)
    axes[0].set_ylabel("Alpha (weight of L_AR)")
    named = table.set_axis([f"Alpha {a:g}, Beta {b:g}" for a, b in table.index])
    return headed(figure, title, caption, of_each(named))


def budgets(table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Robust accuracy against the test's epsilon, a line a training epsilon, and against its steps, a line a number of
    training steps. ``table``: that of ablations.epsilon. Points of different lines are beside each other."""
    frame = table.reset_index()
    eps = "test_eps", "train_eps", "trained at {:g}/255", "test epsilon (1/255)"
    steps = "test_numsteps", "train_numsteps", "trained with PGD-{:g}", "PGD steps of the test"
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.4), sharey=True, layout="constrained")
    numbers = []
    for axis, (x, hue, legend, name), other in zip(axes, (eps, steps), (steps, eps)):
        fixed = list(other[:2])
        shown = frame[(frame[fixed] == frame[fixed].iloc[0]).all(axis=1)]
        style = _shades(shown[hue].unique(), frame[hue].iloc[0])
        beside = 0.015 * (shown[x].max() - shown[x].min())
        for n, (value, look) in enumerate(style.items()):
            line, label = shown[shown[hue] == value].sort_values(x), value if value in LOOKS else legend.format(value)
            drawn = {"fmt": look.marker, "ls": look.line, "color": look.color, "label": label, "capsize": 3, "ms": 7}
            at = line[x] + beside * (n - (len(style) - 1) / 2)
            axis.errorbar(at, line.robust, yerr=between_0_and_100(line.robust, line.robust_ci), **drawn)
            values = [f"{within(r.robust, r.robust_ci)} at {r[x]:g}" for _, r in line.iterrows()]
            numbers.append(f"{label}, by {name}: {', '.join(values)}")
        at = sorted(shown[x].unique())
        axis.set(
            xlabel=name, ylabel="robust accuracy (%)", ylim=(0, None), xticks=at, xticklabels=[f"{e:g}" for e in at]
        )
        axis.yaxis.set_tick_params(labelleft=True)
        axis.legend(fontsize=9)
    return headed(figure, title, caption, "; ".join(numbers))


def _shades(values: Iterable[float | str], usual: float) -> dict[float | str, Look]:
    """Budgets, rising, in shades of TGA-ZSR's colour, the ``usual`` one's; the untuned model in its own look."""
    names, own = [value for value in values if isinstance(value, str)], looks(["TGA-ZSR"])["TGA-ZSR"]
    rising = sorted(value for value in values if not isinstance(value, str))
    lower, higher = (sum(map(of, rising)) for of in (usual.__gt__, usual.__lt__))
    shades = [*sns.blend_palette(["#E8914F", own.color], lower + 1)[:-1], own.color]
    shades += sns.blend_palette([own.color, "#4A1F00"], higher + 1)[1:]
    others = zip(cycle("osv^PX"), cycle(("--", "-.", ":")))
    drawn = {
        v: Look(shade, *((own.marker, own.line) if v == usual else next(others))) for v, shade in zip(rising, shades)
    }
    return drawn | looks(names)


def against_attacks(table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Robust accuracy against the attack, a line a model; ``table``: that of "does_it_hold", index (model, attack)."""
    models = looks(table.index.get_level_values(0))
    attacks = max((table.loc[model].index for model in models), key=len)
    figure, axis = plt.subplots(figsize=(1.15 * len(attacks) + 3, 5), layout="constrained")
    for n, (model, look) in enumerate(models.items()):
        line = table.loc[model].reindex(attacks)
        at = [place + 0.7 * ((n + 0.5) / len(models) - 0.5) for place in range(len(attacks))]
        drawn = {"fmt": look.marker, "ls": look.line, "color": look.color, "lw": 0.7, "elinewidth": 1, "ms": 6}
        axis.errorbar(at, line.robust, between_0_and_100(line.robust, line.robust_ci), label=model, capsize=2, **drawn)
    for between in range(1, len(attacks)):
        axis.axvline(between - 0.5, color="0.85", lw=0.8)
    axis.grid(False, axis="x")
    labels = [attack.replace(", ", ",\n").replace(" made", "\nmade").replace(" as", "\nas") for attack in attacks]
    axis.set(xticks=range(len(attacks)), xticklabels=labels, ylabel="robust accuracy (%)", ylim=(0, None))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return headed(figure, title, caption, of_each(table[["robust", "robust_ci"]]))


def learning_rates(table: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """Accuracy against the learning rate, a line a method; ``table``: that of ablations.learning_rate."""
    figure, axes = plt.subplots(1, len(KINDS), figsize=(14, 4.6), layout="constrained")
    frame = table.reset_index().sort_values("lr")
    for axis, kind in zip(axes, KINDS):
        for method, look in looks(table.index.get_level_values("method")).items():
            line = frame[frame.method == method]
            drawn = {"fmt": look.marker, "ls": look.line, "color": look.color, "lw": 1.2, "elinewidth": 0.8, "ms": 5}
            axis.errorbar(line.lr, line[kind], between_0_and_100(line[kind], line[f"{kind}_ci"]), label=method, **drawn)
        axis.set(xscale="log", xlabel="learning rate", ylabel=f"{kind} accuracy (%)")
        axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    named = table.set_axis([f"{method} at {lr:g}" for method, lr in table.index])
    return headed(figure, title, caption, of_each(named))


@drawn
def of_ablation(name: str, table: pd.DataFrame, seeds: pd.DataFrame, title: str, caption: str = "") -> Figure:
    """The figure of an ablation: a map over Alpha and Beta, curves over budgets or rates, or a line a variant.

    Two seeds have no interval: Student's t on two means would give one several times as wide as they are apart.
    """
    title, _, more = title.partition("? ")
    title, two_seeds = f"{title.rstrip('?')}?", table.interval == "2 seeds"
    table = table.assign(**{half: table[half].mask(two_seeds) for half in (f"{kind}_ci" for kind in KINDS)})
    over = " or ".join(table.interval[~two_seeds].unique())
    told = [caption.rstrip("."), f"95 % intervals over {over}" if over else ""]
    told.append("means of two seeds, which are dots: too few for an interval" if two_seeds.any() else "")
    caption = ". ".join(part.rstrip(".") for part in ("; ".join(filter(None, told)), more) if part)
    if name == "alpha_beta":
        return alpha_beta(table, title, caption.replace(", which are dots", ""))
    if name == "epsilon":
        return budgets(table, title, caption.replace(", which are dots", ""))
    if name == "learning_rate":
        return learning_rates(table, title, caption)
    if name == "does_it_hold":
        return against_attacks(table, title, caption)
    return ablation(table, seeds, title, caption)
