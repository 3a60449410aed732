"""Published, independently measured and own accuracies: side by side, each source in a column of its own, never mixed.

All are top-1 accuracies in percent of ViT-B/32 tuned on Tiny-ImageNet, at epsilon 1/255, over the 16 published sets.
``data/published_by_set.csv`` has them set by set, ``data/published_table.csv`` the means as they are printed.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

import pandas as pd
import scipy

from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.datasets.published_sets import DATASETS
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import counted, leaderboard, to_frame
from tgazsr_utils.paths import DATA

COLUMNS = {  # the source, as both files name it -> its column
    "TGA-ZSR paper, NeurIPS 2024": "paper",
    "Comp-TGA paper, TPAMI 2026": "paper",
    "UCAT paper, ICML 2026 (arXiv 2512.12997), Table 16": "UCAT",
}
SOURCES = ("paper", "UCAT")
ATTACKS = {"clean": "clean", "pgd-100": "PGD", "pgd": "PGD", "cw": "CW", "autoattack": "AutoAttack"}
KINDS = ("clean", "PGD", "average", "CW", "AutoAttack")  # average: of clean and PGD
ROUNDING = 0.01  # what rounding explains: up to 0.005 of the mean of rounded numbers, and 0.005 of the printed mean
_AS_PUBLISHED = {  # Record.attack -> its column, epsilon and step (1/255; None: it chooses its own), protocol
    "none": ("clean", 0.0, 1.0, "last"),
    "pgd-100": ("PGD", 1.0, 1.0, "last"),
    "cw-100": ("CW", 1.0, 1.0, "last"),
    "apgd-100": ("AutoAttack", 1.0, None, "worst"),
}
_OF_WEIGHTS = {"none": "clean", "apgd-t-100": "AutoAttack"}  # Record.attack -> its name in published_weights.csv


def by_set() -> pd.DataFrame:
    """Accuracy as published set by set: (source, attack, method) x the keys of ``DATASETS``."""
    rows = pd.read_csv(DATA / "published_by_set.csv").replace({"attack": ATTACKS})
    return rows.pivot(index=["source", "attack", "method"], columns="set", values="accuracy")[list(DATASETS)]


def means() -> pd.DataFrame:
    """(source, attack, method) -> ``printed``, the mean over the 16 sets as printed, and ``of_sets``, that of its row.

    NaN where the printed one is not known, or where no row was published.
    """
    table = pd.read_csv(DATA / "published_table.csv")
    printed = table.melt(["source", "method", "venue"], var_name="attack", value_name="printed")
    printed = printed.set_index(["source", "attack", "method"]).printed
    return pd.DataFrame({"printed": printed, "of_sets": by_set().mean(axis=1)}).dropna(how="all")


def misprints() -> pd.DataFrame:
    """Those of ``means`` whose printed mean is not that of its row; ``difference``: printed minus that of the row."""
    table = means().eval("difference = printed - of_sets")
    return table[table.difference.abs() > ROUNDING]


def published(sets: Collection[str] = tuple(DATASETS)) -> pd.DataFrame:
    """Means over sets: method x (one of ``KINDS``, one of ``SOURCES``), NaN for what nobody published.

    Over all 16 as printed, where that is known, else of the rows. "paper" is the TGA-ZSR paper's table (PGD-100; its
    AutoAttack on TGA-ZSR is of another model, at Beta 0.009), and for Comp-TGA its own paper's; "UCAT" is what UCAT's
    authors measured (PGD, its steps are not known here): their own method, and the others trained anew.
    """
    both = means()
    whole = set(sets) == set(DATASETS)
    return _side_by_side(both.printed.fillna(both.of_sets) if whole else by_set()[sorted(sets)].mean(axis=1))


def _side_by_side(accuracy: pd.Series) -> pd.DataFrame:
    """(source, attack, method) -> accuracy as method x (kind, source), methods as in the file, with the averages."""
    table = accuracy.rename(index=COLUMNS, level="source").unstack(["attack", "source"])
    for source in SOURCES:
        table["average", source] = (table["clean", source] + table["PGD", source]) / 2
    methods = pd.read_csv(DATA / "published_table.csv").method.unique()
    columns = pd.MultiIndex.from_product([KINDS, SOURCES])
    return table.reindex(index=pd.Index(methods, name="method"), columns=columns)


def beside(records: Sequence[Record], pretrained: str | None, tuned_on: str | None) -> pd.DataFrame:
    """``published`` over the sets we measured, with (kind, "ours") and (kind, "ours - paper") beside it.

    Our columns are of the attack we measured under; (kind, "ours ±") is half the 95 % interval of ``summary``. They
    stay away, and a line says why, unless all was measured as published: sets with the published counts, prompts and
    preprocessing (perhaps cut by ``quick_eval``), OpenAI's ViT-B/32 tuned on Tiny-ImageNet (None: on nothing), epsilon
    1/255, and PGD-100 or CW-100 with step 1/255 or AutoAttack's "apgd" with 100 steps. Numbers of the mini-world say
    nothing about the published ones. Raises ValueError for records that no one table may mix.
    """
    records = counted(records)
    known = pretrained == "openai" and tuned_on in ("tinyImageNet", None)
    reasons = [] if known else [f"{pretrained} weights" + (f" tuned on {tuned_on}" if tuned_on else "")]
    reasons += dict.fromkeys(reason for r in records if (reason := unlike_published(r)))
    if reasons:
        print(f"not comparable with the published table: {'; '.join(reasons)}")
        return published()
    board, table = leaderboard(records), published({r.dataset for r in records})
    attack = next((_AS_PUBLISHED[r.attack][0] for r in records if r.attack != "none"), "PGD")
    kinds = {"clean": "clean", attack: "robust"} | ({"average": "average"} if attack == "PGD" else {})
    table = table.reindex(table.index.union(board.index, sort=False).rename("method"))
    for kind, column in kinds.items():
        table[kind, "ours"], table[kind, "ours ±"] = board[column], board[f"{column}_ci"]
        for source in SOURCES:
            table[kind, f"ours - {source}"] = table[kind, "ours"] - table[kind, source]
    table = table[[column for kind in KINDS for column in table if column[0] == kind]]
    return table.join(pd.concat({"ours": board[["sets", "images"]]}, axis=1))


def unlike_published(record: Record) -> str | None:
    """Why the published table has no number to set beside it; None: it has."""
    if record.world != "photographs":
        return record.world
    if record.arch != "ViT-B-32-quickgelu":
        return record.arch
    if not record.published or record.dataset not in DATASETS:
        return f"{record.dataset} is not as published"
    step = record.settings.get("test_stepsize", 1.0)
    _, eps, published_step, protocol = _AS_PUBLISHED.get(record.attack, (None, None, None, None))
    if (record.eps_255, record.protocol) == (eps, protocol) and published_step in (step, None):
        return None
    return f"{record.attack}, epsilon {record.eps_255:g}/255, step {step:g}/255, protocol {record.protocol}"


_PRINTED = 0.005  # what the rounding of a printed number hides
AGREES, DIFFERS, NO_NUMBER = "agrees", "differs", "no number for these sets"


def verdicts(records: Sequence[Record], weights: Mapping[str, str | None]) -> pd.DataFrame:
    """Does this machine measure what others published for the very same weights? A row a record and source.

    ``weights``: of the methods that were measured as they are. ``verdict`` is "agrees" where the published number, of
    all images of the set, lies within the 95 % interval (Wilson) of ours, else "differs": one in twenty does by chance.
    Only what is comparable has a ``published`` number; else the verdict says why not. Means that were published for the
    weights over other sets (``data/published_weights.csv``) are shown, not judged. No rows for the mini-world
    and for random weights.
    """
    rows = []
    for row, r in zip(to_frame(records).to_dict("records"), records):
        if weights.get(r.method) and r.world != "mini-world":
            ours = {"set": r.dataset, "ours": row["accuracy"], "low": row["low"], "high": row["high"], "images": r.n}
            for source, number, verdict in _of_others(r, weights[r.method]):
                if not verdict:
                    verdict = AGREES if row["low"] - _PRINTED <= number <= row["high"] + _PRINTED else DIFFERS
                theirs = {"source": source, "published": number, "verdict": verdict}
                rows.append({"method": r.method, "attack": r.attack} | ours | theirs)
    columns = ["method", "attack", "set", "ours", "low", "high", "images", "source", "published", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _of_others(record: Record, weights: str | None) -> Iterator[tuple[str, float, str]]:
    """(source, published accuracy, why it cannot be compared, or nothing) of a record's weights, set and attack."""
    kind = _AS_PUBLISHED.get(record.attack, ("", 0, 0, ""))[0]
    if record.world == PLUMBING:
        yield "", float("nan"), PLUMBING
    elif weights == "openai":
        reason = unlike_published(record)
        known = pd.Series({"": float("nan")}) if reason else by_set()[record.dataset].xs((kind, "CLIP"), level=(1, 2))
        yield from ((COLUMNS.get(source, ""), number, reason or "") for source, number in known.items())
    else:
        kind = _OF_WEIGHTS.get(record.attack)
        means = pd.read_csv(DATA / "published_weights.csv").query("weights == @weights and attack == @kind")
        means = [m for m in means.itertuples() if m.eps_255 == record.eps_255]
        yield from ((f"{m.source}, mean of {len(m.sets.split())} sets", m.accuracy, NO_NUMBER) for m in means)
        if not means:
            yield "", float("nan"), NO_NUMBER


def points(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of a table of ``beside``: source -> robust, clean and average of its methods at the attack ours were measured at.

    Empty where ours stay away.
    """
    attack = next((kind for kind in ("PGD", "CW", "AutoAttack") if (kind, "ours") in table), None)
    sources = SOURCES if attack else ()
    found = {s: pd.DataFrame({"robust": table[attack, s], "clean": table["clean", s]}).dropna() for s in sources}
    return {source: rows.assign(average=rows.mean(axis=1)) for source, rows in found.items()}


def ranks(board: pd.DataFrame) -> pd.DataFrame:
    """Ranks by average, of each two of ``leaderboard`` ("here"), "paper" and "UCAT", among the methods that both have.

    method x ("here and paper", "here"), ...; 1 is best, equal ones share the mean of theirs. An order may be compared
    where numbers may not: those of other models, images and epsilons.
    """
    averages = {"here": board.average} | {source: published()["average", source] for source in SOURCES}
    pairs = {f"{a} and {b}": pd.DataFrame({a: averages[a], b: averages[b]}) for a, b in combinations(averages, 2)}
    ranked = {name: pair.dropna().round(6).rank(ascending=False) for name, pair in pairs.items()}
    methods = board.index.union(published().index, sort=False).rename("method")
    return pd.concat(ranked, axis=1).reindex(methods).dropna(how="all")


def agreement(table: pd.DataFrame) -> str:
    """Of a table of ``ranks``, a line for each two: Spearman's rank correlation and how many methods it is over."""
    lines = []
    for pair in table.columns.unique(0):
        a, b = (table[pair].dropna()[side] for side in table[pair])
        if len(a) < 3 or min(a.nunique(), b.nunique()) < 2:
            lines.append(f"{pair}: no order to compare ({len(a)} methods in common)")
            continue
        best = ", ".join(f"{' = '.join(side.index[side == side.min()])} ({side.name})" for side in (a, b))
        rho = scipy.stats.spearmanr(a, b).statistic
        lines.append(f"{pair}: rank correlation {rho:+.2f} over {len(a)} methods; best: {best}")
    return "\n".join(lines)


def readable(table: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """To look at: numbers with so many digits, and nothing where there is none."""
    shown = lambda value: f"{value:.{digits}f}" if isinstance(value, float) else value
    return table.map(shown, na_action="ignore").astype(object).where(table.notna(), "")
