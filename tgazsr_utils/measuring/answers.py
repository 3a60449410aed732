"""Each notebook's answer: one sentence made from its numbers, whose yes, no or undecided follows from intervals.

Intervals are at 95 %, over images, as (value, low, high).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy

from tgazsr_utils.measuring.holding import ALL, BASELINE
from tgazsr_utils.measuring.loss_mixture import in_words
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import difference, number_of, to_frame

Interval = tuple[float, float, float]
SUBJECT = "TGA-ZSR"  # whose answer it is, where it is among the methods; else the last one's
UNTUNED = "CLIP"
FRAGILE = 4  # an attack that leaves less than one in so many of what is right when clean has found a fragile model
SPARED = 1.0  # percentage points: robustness of which surely no more is lost under further attacks is real

# Column -> how people are told of it, with an arrow to where better is.
HEADINGS = {
    "robust": "robust, % ↑",
    "clean": "clean, % ↑",
    "average": "average, % ↑",
    "harmonic": "harmonic mean, % ↑",
    "interval": "± over",
    "robust_minus_first": "robust − first, points ↑",
    "clean_minus_first": "clean − first, points ↑",
    "clean (%)": "clean, % ↑",
    "robust (%)": "robust, % ↑",
    "l2": "attention moved (l2) ↓",
    "cosine": "cosine of maps ↑",
    "iou_top20": "top fifth kept (IoU) ↑",
    "centre_move": "centre moved, patches ↓",
    "energy_clean": "on the object, clean ↑",
    "energy_adv": "on the object, attacked ↑",
    "energy_uniform": "on the object, if even",
    "flip AUC": "shift tells flips, AUC",
}


def headed(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the headings that people read."""
    return table.rename(columns=HEADINGS)


def subject(methods: Sequence[str]) -> str | None:
    """Whose answer a notebook gives."""
    return SUBJECT if SUBJECT in methods else next(reversed(methods), None)


def verdict(of: Interval, bound: float = 0.0) -> str:
    """Is it more than ``bound``, beyond chance?"""
    _, low, high = of
    return "Yes" if low > bound else "No" if high < bound else "Undecided"


def pretraining(table: pd.DataFrame, images: Sequence[int]) -> str:
    """00: is the model accurate (most images are right), and fragile (see ``FRAGILE``)?

    ``table``: a row a set, in percent, columns "clean" and "eps ..." by rising epsilon; ``images``: of each set.
    """
    of = {name: _mean_of_sets(table[name], images) for name in table}
    clean, attacked = of.pop("clean"), of
    limit = clean[0] / FRAGILE
    found = next((name for name in attacked if verdict(attacked[name], limit) == "No"), [*attacked][-1])
    accurate, robust = verdict(clean, 50), verdict(attacked[found], limit)
    both = "Yes" if (accurate, robust) == ("Yes", "No") else "Undecided"
    both = "No" if accurate == "No" or robust == "Yes" else both
    return (
        f"{both}: zero-shot it is right on {_shown(clean, 1)} % of clean images, mean over {len(table)} sets, and on "
        f"{_shown(attacked[found], 1)} % under an attack at epsilon {found.removeprefix('eps ')}/255."
    )


def attention_shift(frame: pd.DataFrame, auc: Mapping[str, Interval]) -> str:
    """01: does tuning keep attention in place, and does the shift tell which answers flip?

    ``frame``: a row an image and model ("original", perhaps "tuned"), in the same order; ``auc``: of each model.
    """
    moved = {name: part.l2.to_numpy() for name, part in frame.groupby("model", sort=False)}
    sentence = f"the attack moves attention by {_shown(_mean(moved['original']))}"
    if "tuned" in moved:
        less = verdict(_mean(moved["original"] - moved["tuned"]))
        sentence += f", after tuning by {_shown(_mean(moved['tuned']))}"
    else:
        less, sentence = "Undecided", f"{sentence}, and no tuned model is beside it"
    tells = {
        "Yes": "the shift tells which answers flip",
        "No": "attention moves more where answers stay",
        "Undecided": "the shift is not shown to tell which answers flip",
    }
    area = auc.get("original", 3 * (np.nan,))  # none, if no image is right when clean
    known = verdict(area, 0.5) if area[1] < area[2] else "Undecided"  # the bootstrap of few images may have no width
    of_flips = "no answers to tell apart" if np.isnan(area[0]) else f"{tells[known]}, AUC {_shown(area)}"
    return f"{less}: {sentence} (l2 distance of maps, {len(moved['original'])} images); {of_flips}."


def fine_tuning(records: Sequence[Record], methods: Sequence[str]) -> str:
    """02: is the model robust on the set that it was tuned on, at what cost, and by the attention terms?"""
    method, right = subject(methods), _accuracies(records)
    if (method, "robust") not in right or (UNTUNED, "robust") not in right:
        return f"Undecided: robust accuracy of {method} or {UNTUNED} is not counted, as the attack cannot be trusted."
    more, clean = (_gain(records, kind, method, UNTUNED) for kind in ("robust", "clean"))
    sentence = (
        f"under attack {method} is right on {right[method, 'robust']:.1f} % of held-out images where the untuned model "
    )
    sentence += f"is on {right[UNTUNED, 'robust']:.1f} % ({_points(more)}), and on clean ones {_points(clean)}"
    if method != BASELINE and (BASELINE, "robust") in right:
        sentence += f"; {_against(records, method, BASELINE)}"
    return f"{verdict(more)}: {sentence}."


def ablations(parts: pd.DataFrame | None, of_seeds: Mapping[int, Interval], method: str, other: str) -> str:
    """03: would another seed have told the same of ``method`` against ``other``, and which part of the loss counts?

    ``parts``: the table of ablation "loss_parts"; ``of_seeds``: seed -> difference in robust accuracy.
    """
    found = {verdict(of) for of in of_seeds.values()}
    same = "Undecided" if len(of_seeds) < 2 or "Undecided" in found else "Yes"
    same = "No" if {"Yes", "No"} <= found else same
    each = ", ".join(f"{_points(of)} with seed {seed}" for seed, of in of_seeds.items())
    sentence = f"in robust accuracy {method} differs from {other} by {each}" if each else "seeds were not compared"
    if parts is not None:
        rows = [(name, tuple(row)) for name, row in parts.filter(regex="^robust_minus_first").iloc[1:].iterrows()]
        beyond = [name for name, of in rows if verdict(of) != "Undecided"]
        chance = f"beyond chance for {' and '.join(beyond)}" if beyond else "none of it beyond chance"
        changes = ", ".join(f"{name} by {_points(of)}" for name, of in rows)
        sentence += f"; compared with {parts.index[0]} alone, {changes}, {chance}"
    return f"{same}: {sentence}."


def of_seeds(records: Sequence[Record], method: str, other: str) -> dict[int, Interval]:
    """Seed -> paired difference of two methods in robust accuracy, of the seeds that both have."""
    if method == other:
        return {}
    part = lambda seed: [r for r in records if r.seed == seed]
    both = sorted({r.seed for r in records if r.method == method} & {r.seed for r in records if r.method == other})
    return {seed: _gain(part(seed), "robust", method, other) for seed in both}


def evaluation(records: Sequence[Record], table: pd.DataFrame, methods: Sequence[str], tuned_on: str | None) -> str:
    """04: does robustness carry over to sets that were not tuned on, and which method is best?

    ``table``: the leaderboard, best average first.
    """
    counted = [not methods or name == UNTUNED or name.split(" w=")[0] in methods for name in table.index]
    given = [name for name, counts in zip(table.index, counted) if not counts]
    table = table[counted]
    ranked = table.average.dropna().index.tolist()
    best = f"the best average has {ranked[0]}, {_half(table.loc[ranked[0]])}" if ranked else "no average is counted"
    apart = f" (without {' and '.join(given)}: given weights may be tuned on anything)" if given else ""
    method, elsewhere = subject(methods), [r for r in records if r.dataset != tuned_on]
    where = "that it was not tuned on" if method else "(on which its weights were tuned is not known here)"
    method = method or next((name for name in table.index if name != UNTUNED), None)  # the best of those given
    if method is None:
        return f"Undecided: nothing was tuned here; of {len(table)} models {best}."
    right, sets = _accuracies(elsewhere), len({r.dataset for r in elsewhere})
    if (method, "robust") not in right or (UNTUNED, "robust") not in right:
        why = "no other set was measured" if not elsewhere else "robust accuracy is not counted"
        return f"Undecided: {why} for {method} or {UNTUNED}; of {len(table)} models {best}."
    more, plural = _gain(elsewhere, "robust", method, UNTUNED), "sets" if sets > 1 else "set"
    if ranked and ranked[0] != method:
        place = ranked.index(method) + 1 if method in ranked else "none"
        best += f", and {method} is number {place} with {_half(table.loc[method])}"
    sentence = f"{verdict(more)}: on {sets} {plural} {where}, {method} is right on "
    sentence += f"{right[method, 'robust']:.1f} % under attack where the untuned model is on "
    return sentence + f"{right[UNTUNED, 'robust']:.1f} % ({_points(more)}); of {len(table)} models {best}{apart}."


def explorer(
    mixed: pd.DataFrame, between: pd.DataFrame, sweep: pd.DataFrame | None, source: str, moved: Mapping[str, float]
) -> str:
    """05: do the two attention terms change what comes out, what are they of the loss, and is another place better?

    ``mixed``, ``between``: ``loss_mixture.mixture`` and ``cosines`` at one Alpha and Beta; ``sweep``: the table of
    ablation "alpha_beta", whose first row the others were compared with, and its ``source``; ``moved``: model -> l2
    distance that attention moves under attack, on one image.
    """
    words = in_words(mixed, between)
    told = f"At Alpha {mixed.weight['L_AR']:g} and Beta {mixed.weight['L_AMC']:g}, {words[0].lower()}{words[1:]}"
    if moved:
        shifts = ", ".join(f"{shift:.2f} ({name})" for name, shift in moved.items())
        told += f" On the image shown the attack moves attention by {shifts}."
    if sweep is None:
        return f"Undecided: {source}. {told}"
    changes, gained = _by_the_terms(sweep)
    return f"{changes}: {gained}; {_of_the_best(sweep)} ({source}). {told}"


def _by_the_terms(sweep: pd.DataFrame) -> tuple[str, str]:
    """Does tuning at the first row's Alpha and Beta lead elsewhere than without both terms?"""
    first, none = sweep.iloc[0], sweep[(sweep.Alpha == 0) & (sweep.Beta == 0)]
    place = f"Alpha {first.Alpha:g} and Beta {first.Beta:g}"
    gains = _minus_first(none.iloc[0], turned=True) if len(none) and none.index[0] != first.name else {}
    if not gains:
        return "Undecided", f"{place} are not compared with neither term"
    beyond = any(verdict(gain) != "Undecided" for gain in gains.values())
    # An interval without a width is of too few images to show that nothing changes.
    spared = all(-SPARED < low < high < SPARED for _, low, high in gains.values())
    each = " and ".join(f"{kind} accuracy by {_points(gain)}" for kind, gain in gains.items())
    return "Yes" if beyond else "No" if spared else "Undecided", f"{place} change {each}, compared with neither term"


def _of_the_best(sweep: pd.DataFrame) -> str:
    """How far the place with the best average is from the first row's."""
    known = sweep.dropna(subset=["average"])
    if known.empty:
        return "no average is counted"
    best = known.loc[known.average.idxmax()]
    gains = _minus_first(best)
    if not gains:
        return f"of {len(known)} places measured none has a better average"
    beyond = [kind for kind, gain in gains.items() if verdict(gain) != "Undecided"]
    chance = f"beyond chance in {' and '.join(beyond)} accuracy" if beyond else "which may be chance"
    more = ", ".join(f"{kind} {_points(gain)}" for kind, gain in gains.items())
    return f"of {len(known)} places measured ({best.Alpha:g}, {best.Beta:g}) has the best average, {more}, {chance}"


def _minus_first(row: pd.Series, turned: bool = False) -> dict[str, Interval]:
    """A row minus the first one, "robust" and "clean" as far as counted; ``turned``: the first one minus it."""
    found = {kind: [row[f"{kind}_minus_first{end}"] for end in ("", "_low", "_high")] for kind in ("robust", "clean")}
    counted = {kind: tuple(of) for kind, of in found.items() if not np.isnan(of[0])}
    return {kind: (-mean, -high, -low) if turned else (mean, low, high) for kind, (mean, low, high) in counted.items()}


def holds(table: pd.DataFrame, images: int) -> str:
    """06: is robustness real: does what withstands the first attack withstand all (but for ``SPARED``)?

    ``table``: of "does_it_hold", index (model, attack), the last attack being all of them together. Where none of
    ``images`` is lost, three in so many may be (the rule of three), which the interval of the difference does not know.
    """
    models = [*dict.fromkeys(table.index.get_level_values(0))]
    model = subject([name for name in models if name != UNTUNED] or models)
    first, together = table.loc[model].iloc[0], table.loc[(model, ALL)]
    lost = tuple(together[f"robust_minus_first{end}"] for end in ("", "_low", "_high"))
    if np.isnan(first.robust):
        return f"Undecided: robust accuracy of {model} is not counted, as the attack cannot be trusted."
    lost = (lost[0], min(lost[1], -300 / images), min(lost[2], 0.0))  # nothing is won by more attacks
    real = "Yes" if lost[1] > -SPARED else "No" if lost[2] < 0 else "Undecided"
    return (
        f"{real}: {model} is right on {first.robust:.1f} % of images under {table.loc[model].index[0]} and on "
        f"{together.robust:.1f} % under {ALL}, {_points(lost)} on {number_of(images, 'image')}."
    )


def _gain(records: Sequence[Record], kind: str, method: str, other: str) -> Interval:
    """Paired difference in "robust" or "clean" accuracy, percentage points."""
    return difference(kind, *([r for r in records if r.method == name] for name in (method, other)))


def _against(records: Sequence[Record], method: str, other: str) -> str:
    more = _gain(records, "robust", method, other)
    chance = f"which may be chance: what {method} adds to it is not shown to do it"
    chance = chance if verdict(more) == "Undecided" else "beyond chance"
    return f"compared with {other} that is {_points(more)} under attack, {chance}"


def _accuracies(records: Sequence[Record]) -> Mapping[tuple[str, str], float]:
    """(method, "robust" or "clean") -> mean over sets and seeds, in percent."""
    return to_frame(records).groupby(["method", "kind"]).accuracy.mean() if records else {}


def _mean(values: np.ndarray) -> Interval:
    mean, n = float(np.mean(values)), len(values)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    return mean, mean - half, mean + half


def _mean_of_sets(percent: pd.Series, images: Sequence[int]) -> Interval:
    """Sets weigh the same; with one success and one failure more in each, as in ``tables.summary``."""
    n = np.asarray(images) + 2
    share = (percent.to_numpy() / 100 * (n - 2) + 1) / n
    half = 196 * float(np.sqrt(np.sum(share * (1 - share) / n))) / len(n)
    return float(percent.mean()), max(0.0, percent.mean() - half), min(100.0, percent.mean() + half)


def _shown(of: Interval, digits: int = 2) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*of, d=digits)


def _points(of: Interval) -> str:
    value, low, high = (round(bound, 1) + 0.0 for bound in of)  # no -0.0
    return f"{value:+.1f} points" + ("" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]")


def _half(row: pd.Series) -> str:
    return f"{row.average:.1f} ± {row.average_ci:.1f}"
