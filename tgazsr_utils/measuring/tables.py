"""Tables made from Records: intervals, paired differences, and the refusal to mix what does not belong together."""

from collections.abc import Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.datasets.miniworld import TASKS
from tgazsr_utils.datasets.published_sets import DATASETS, in_means
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.runtime.files import write_atomic
from tgazsr_utils.runtime.weights import image_size_of

PUBLISHED_SETS = 16
_COLUMNS = {
    "method",
    "model",
    "arch",
    "world",
    "dataset",
    "data",
    "pixels",
    "attack",
    "eps_255",
    "settings",
    "protocol",
    "precision",
    "code",
    "seed",
    "n",
    "available",
    "left_out",
    "correct",
}


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record: the columns a table or figure needs, accuracy and its 95 % Wilson interval in percent."""
    rows = []
    for r in records:
        low, high = scipy.stats.binomtest(r.correct, r.n).proportion_ci(method="wilson")
        kind = "clean" if r.attack == "none" else "robust"
        row = r.model_dump(include=_COLUMNS)
        rows.append(row | {"kind": kind, "accuracy": r.accuracy, "low": 100 * low, "high": 100 * high})
    return pd.DataFrame(rows)


def counted(records: Sequence[Record]) -> list[Record]:
    """Those of the sets that a mean is over: see ``in_means``."""
    keys = {*in_means(r.dataset for r in records)}
    return [r for r in records if r.dataset in keys]


def per_seed(records: Sequence[Record]) -> pd.DataFrame:
    """One row a seed: robust and clean accuracy, each a mean over its sets, and their average, in percent."""
    means = to_frame(counted(records)).pivot_table(index="seed", columns="kind", values="accuracy", aggfunc="mean")
    means = means.reindex(columns=["robust", "clean"])  # NaN: what is not counted
    return means.assign(average=means.mean(axis=1, skipna=False))


def summary(records: Sequence[Record]) -> dict[str, float | str]:
    """Of one model or method: robust and clean accuracy and their average, means over sets and then seeds, in percent.

    Each with ``_ci``, half the width of its 95 % interval. ``interval`` says what that is over: "3 seeds" (Student's t
    on their means), or "images" (normal, with one success and one failure added to each set; sets weigh the same) where
    there is one seed. Raises ValueError for records that no one table may mix.
    """
    _refuse_mixture(to_frame(records))
    records = counted(records)
    means = per_seed(records)
    if len(means) > 1:
        halves = scipy.stats.t.ppf(0.975, len(means) - 1) * means.std(skipna=False) / np.sqrt(len(means))
        interval = f"{len(means)} seeds"
    else:
        robust = {r.data: bits(r) for r in records if r.attack != "none"}
        clean = {r.data: bits(r) for r in records if r.attack == "none"}
        both = {data: (robust[data] + clean[data]) / 2 for data in robust if data in clean}
        kinds = {"robust": robust, "clean": clean, "average": both}
        # One success and one failure more in each set: a set of few images that are all right is no certainty.
        halves = {
            kind: 100 * _half_interval([np.append(values, (0, 1)) for values in sets.values()], ddof=0)
            for kind, sets in kinds.items()
        }
        interval = "images"
    row = {}
    for kind in means:
        row |= {kind: means[kind].mean(skipna=False), f"{kind}_ci": halves[kind]}
    return row | {"interval": interval}


def _half_interval(sets: Sequence[np.ndarray], ddof: int, z: float = 1.96) -> float:
    """Half the 95 % interval of a mean over sets of means over images; NaN without any, or for a single image."""
    if not sets or min(map(len, sets)) <= ddof:
        return float("nan")
    return float(z * np.sqrt(np.sum([values.var(ddof=ddof) / len(values) for values in sets])) / len(sets))


def leaderboard(records: Sequence[Record], under: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a method, best average first: its ``summary``, and what it was measured on.

    ``harmonic`` is the harmonic mean of clean and robust accuracy, that under the strongest attack of ``under``, a part
    of ``under_attacks``. ``sets`` says "n of 16" when some are missing, and which are not in the means. Records behind
    a defence are not in it, see ``defences``. Raises ValueError for records of several worlds, attacks, protocols or
    versions of the code, methods measured on different images, or two models of one method and seed: no one table may
    mix them.
    """
    records = undefended(records)
    frame = to_frame(records)
    _refuse_mixture(frame)
    apart = sorted({*frame.dataset} - {*in_means(frame.dataset)})
    frame = frame[~frame.dataset.isin(apart)]
    rows = {method: summary([r for r in records if r.method == method]) for method in frame.method.unique()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    robust = table.robust if under is None else under.loc[table.index].min(axis=1)
    both = (table.clean + robust).replace(0, 1)
    table.insert(table.columns.get_loc("average_ci") + 1, "harmonic", 2 * table.clean * robust / both)
    table["sets"] = _sets_used(frame.dataset.unique()) + (f" (without {', '.join(apart)})" if apart else "")
    table["images"] = pd.Series({method: _images_used(part) for method, part in frame.groupby("method")})
    table["world"] = frame.world.iloc[0]
    return table.sort_index().sort_values("average", ascending=False, kind="stable")


def under_attacks(records: Sequence[Record]) -> pd.DataFrame:
    """Robust accuracy as in ``leaderboard``: a row a method, a column an attack and epsilon, such as "cw-10, 1/255".

    Of an attack on other models that of the source which leaves least, named by a further column ("..., from").
    """
    names = {r.model: r.method for r in records} | {"": ""}
    clean = [r for r in records if r.attack == "none"]
    found: dict[str, dict[str, list[Record]]] = {}
    for r in (r for r in records if r.attack != "none"):
        settings = {name: value for name, value in r.settings.items() if name != "source"}
        source = names.get(r.settings.get("source", ""), r.settings.get("source"))
        of_attack = found.setdefault(f"{r.attack}, {r.eps_255:g}/255", {})
        of_attack.setdefault(source, []).append(r.model_copy(update={"settings": settings}))
    table = pd.DataFrame(index=pd.Index(list(dict.fromkeys(r.method for r in records)), name="method"))
    for column, sources in found.items():
        robust = pd.DataFrame({name: leaderboard([*clean, *part]).robust for name, part in sources.items()})
        table[column] = robust.min(axis=1)
        if "" not in sources:
            table[f"{column}, from"] = robust.dropna(how="all").idxmin(axis=1)
    return table


def undefended(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if not r.defence]


def defences(records: Sequence[Record]) -> pd.DataFrame:
    """One row a method and defence, "none" among them: accuracy clean and under the attack, and what answers cost.

    ``unaware``: attacked as if there were no defence; ``aware``: by one who knows of it, and so counts an image that
    either attack fools, that through the defence or that. Each as ``summary`` has it, and the one never without the
    other: NaN where either is missing. ``forwards`` and ``backwards``: passes of the image encoder
    for one answer, a mean over all images of the row. Raises ValueError as ``leaderboard`` does.
    """
    name = lambda r: f"{r.method} behind {r.defence or 'nothing'}"
    rows = {name(r): (r.method, r.defence or "none") for r in records}
    plain = [(r, r.model_copy(update={"method": name(r), "defence": ""})) for r in records]
    unaware, through = (
        [p for r, p in plain if r.attack == "none" or not r.defence or r.aware == aware] for aware in (False, True)
    )
    boards = {"unaware": leaderboard(unaware), "aware": leaderboard(combined(np.logical_and, through, unaware))}
    table = boards["aware"].reindex([*rows])
    both = boards["aware"].robust.notna() & boards["unaware"].robust.notna()
    for side, board in boards.items():
        table[[side, f"{side}_ci"]] = board[["robust", "robust_ci"]].where(both)
    cost = pd.DataFrame([{"row": name(r), "n": r.n, "f": r.n * r.forwards, "b": r.n * r.backwards} for r in records])
    cost = cost.groupby("row").sum()
    table["forwards"], table["backwards"] = cost.f / cost.n, cost.b / cost.n
    shown = ["clean", "clean_ci", "unaware", "unaware_ci", "aware", "aware_ci", "forwards", "backwards"]
    table.index = pd.MultiIndex.from_tuples(rows.values(), names=["method", "defence"])
    return table[[*shown, "interval", "sets", "images", "world"]]


def _sets_used(keys: Sequence[str]) -> str:
    """How many of the 16 sets (or of the mini-world's 16 tasks) a mean is over, and how many others."""
    known = sum(key in DATASETS or key in TASKS for key in keys)
    others = len(keys) - known
    if not known:
        return str(others)
    text = str(known) if known == PUBLISHED_SETS else f"{known} of {PUBLISHED_SETS}"
    return text + (f" and {others} others" if others else "")


def _images_used(part: pd.DataFrame) -> str:
    """How many images a method's means are over, and what is missing from them."""
    sets = part.drop_duplicates("dataset")
    used, whole = int(sets.n.sum()), int(sets.available.astype(float).fillna(sets.n).sum())
    text = f"{used:,}" if used == whole else f"{used:,} of {whole:,}"
    return text + (f", {sets.left_out.sum()} unreadable left out" if sets.left_out.any() else "")


def _refuse_mixture(frame: pd.DataFrame) -> None:
    """Raises ValueError for records that no one table may mix."""
    attacked = frame[frame.kind == "robust"]
    of_attack = pd.DataFrame(list(attacked.settings)).add_prefix("settings.")
    mixed = [frame[["world", "code"]], attacked[["attack", "eps_255", "protocol", "precision"]], of_attack]
    for column, values in ((column, part[column].unique()) for part in mixed for column in part):
        if len(values) > 1:
            raise ValueError(
                f"records differ in {column} ({', '.join(sorted(map(str, values)))}); one table holds one {column}"
            )
    for name in (name for name, part in frame.groupby("dataset") if not _of_one_set(part)):
        sides = [", ".join(part.method.unique()) for _, part in frame[frame.dataset == name].groupby("data")]
        raise ValueError(
            f"records of {name} are of different images, labels or prompts: those of {' and of '.join(sides)}; "
            "one table holds one set of each name"
        )
    changed = frame.groupby(["dataset", "data"]).pixels.nunique() > 1
    if changed.any():
        name = changed[changed].index[0][0]
        sides = [", ".join(part.method.unique()) for _, part in frame[frame.dataset == name].groupby("pixels")]
        raise ValueError(
            f"files of {name} changed between measurements: {' and '.join(sides)} saw different pixels; "
            "remove the records that were made with the wrong ones"
        )
    one = ["method", "seed", "dataset", "kind"]
    twice = frame[frame.duplicated(one, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        models = ", ".join(twice[(twice[one] == first[one]).all(axis=1)].model)
        raise ValueError(
            f"{first.method}, seed {first.seed}, has several {first.kind} records on {first.dataset} "
            f"(of models {models}); one table holds one"
        )
    sets = frame.groupby(["method", "seed", "kind"])["dataset"].agg(frozenset)
    if sets.nunique() > 1:
        raise ValueError("methods or seeds were measured on different sets; their means cannot be compared")


def _of_one_set(part: pd.DataFrame) -> bool:
    """Are records of one name of the same images? Models that take another size see the same number at that size."""
    if part.data.nunique() == 1:
        return True
    one_a_side = part.groupby(part.arch.map(image_size_of)).data.nunique().max() == 1
    return one_a_side and len(part[["n", "available", "left_out"]].drop_duplicates()) == 1


def paired_difference(a: Sequence[Record], b: Sequence[Record]) -> tuple[float, float, float]:
    """Mean over sets of accuracy(a) - accuracy(b) in percentage points, with its 95 % interval, on the same images.

    The interval is over images, not over trainings. Raises ValueError if the two were not measured on the same images
    and seeds, each both clean or both under an attack.
    """
    a, b = counted(a), counted(b)
    key = lambda r: (r.data, r.attack == "none", r.seed)
    match = {key(r): r for r in b}
    if {key(r) for r in a} != set(match) or len(a) != len(match):
        raise ValueError("a paired difference needs both methods measured on the same images and seeds")
    by_set: dict[str, list[np.ndarray]] = {}
    for r in a:
        difference = bits(r).astype(float) - bits(match[key(r)])
        by_set.setdefault(r.data, []).append(difference)
    each_image = [np.mean(seeds, axis=0) for seeds in by_set.values()]  # seeds share images: first averaged for each
    mean = 100 * np.mean([d.mean() for d in each_image])
    half = 100 * _half_interval(each_image, ddof=1)
    return float(mean), *(float(np.clip(end, -100, 100)) for end in (mean - half, mean + half))


def differences(records: Sequence[Record]) -> pd.DataFrame:
    """Every pair of methods: ``paired_difference`` of robust and of clean accuracy, best average first.

    Columns ``kind``, ``method``, ``other``, ``difference`` (method - other), ``low``, ``high``. A method with one
    seed, as the untuned model has, stands for itself beside each seed of the other. NaN where two models take images of
    different sizes: these are not the same ones, and a perturbation of one size is not the other's.
    """
    rows, records = [], undefended(records)
    for method, other in product(leaderboard(records).index, repeat=2):
        a, b = ([r for r in records if r.method == name] for name in (method, other))
        alike = {r.data for r in a} == {r.data for r in b}
        for kind in ("robust", "clean"):
            rows.append((kind, method, other, *(difference(kind, a, b) if alike else 3 * (float("nan"),))))
    return pd.DataFrame(rows, columns=["kind", "method", "other", "difference", "low", "high"])


def compare(a: Sequence[Record], b: Sequence[Record]) -> pd.DataFrame:
    """Of two runs: a row a method that both have; columns "robust" and "clean" say ``a`` minus ``b``, paired."""
    rows, a, b = {}, undefended(a), undefended(b)
    for method in dict.fromkeys(r.method for r in a):
        pair = [[r for r in records if r.method == method] for records in (a, b)]
        if pair[1]:
            rows[method] = {kind: _said(kind, *pair) for kind in ("robust", "clean")}
    return pd.DataFrame.from_dict(rows, orient="index")


def of_one_weight(records: Sequence[Record]) -> list[str]:
    """A line for methods whose weights are the same to the bit, such as those whose terms train nothing."""
    names: dict[tuple[str, int], dict[str, None]] = {}
    for record in records:
        names.setdefault((record.model, record.seed), {})[record.method] = None
    alike = dict.fromkeys(" and ".join(group) for group in names.values() if len(group) > 1)
    return [f"{group} have the same weights, to the bit: what differs between them trains nothing" for group in alike]


def _said(kind: str, a: Sequence[Record], b: Sequence[Record]) -> str:
    try:
        mean, low, high = difference(kind, a, b)
    except ValueError as error:
        return f"not comparable: {error}"
    return "not counted" if np.isnan(mean) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def difference(kind: str, a: Sequence[Record], b: Sequence[Record]) -> tuple[float, float, float]:
    """``paired_difference`` of "robust" or of "clean" accuracy; NaN where it is not counted in all seeds."""
    picked = [[r for r in records if (r.attack == "none") == (kind == "clean")] for records in (a, b)]
    if any({r.seed for r in part} != {r.seed for r in whole} for part, whole in zip(picked, (a, b))):
        return float("nan"), float("nan"), float("nan")
    return paired_difference(*_beside_each_seed(*picked))


def _beside_each_seed(a: Sequence[Record], b: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The same, but that records of one seed, such as the untuned model's, are repeated for each seed of the others."""
    repeat = lambda records, seeds: [r.model_copy(update={"seed": seed}) for r in records for seed in seeds]
    seeds_a, seeds_b = ({r.seed for r in records} for records in (a, b))
    if len(seeds_a) == 1:
        return repeat(a, seeds_b), list(b)
    return list(a), repeat(b, seeds_a) if len(seeds_b) == 1 else list(b)


def bits(record: Record) -> np.ndarray:
    """Which images were right ``[n]``, 0 or 1."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(record.hits), np.uint8))[: record.n]


def combined(of_bits: np.ufunc, *parts: Sequence[Record], **about: Any) -> list[Record]:
    """Records as those of the first part, but ``about``, with each image's bits under attack combined over all parts.

    Those of a method, of images and of a seed belong together; ``of_bits``: such as ``np.logical_and``.
    """
    key = lambda r: (r.method, r.data, r.seed)
    known = [{key(r): bits(r) for r in part if r.attack != "none"} for part in parts]
    found = []
    for r in parts[0]:
        if r.attack != "none":
            value = reduce(of_bits, (part[key(r)] for part in known if key(r) in part)).astype(np.uint8)
            changes = {"correct": int(value.sum()), "hits": np.packbits(value).tobytes().hex()}
            r = r.model_copy(update=about | changes)
        found.append(r)
    return found


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table of summaries to look at: "48.6 ± 0.3" for a mean and interval, "+3.1 [2.0, 4.3]" for a difference."""
    shown = table.copy()
    for kind in [column.removesuffix("_ci") for column in table if column.endswith("_ci")]:
        halves = shown.pop(f"{kind}_ci")
        with_half = [f"{a:.1f}" + ("" if np.isnan(h) else f"\u00a0±\u00a0{h:.1f}") for a, h in zip(table[kind], halves)]
        shown[kind] = ["not counted" if np.isnan(a) else text for a, text in zip(table[kind], with_half)]
    if "harmonic" in shown:
        shown["harmonic"] = ["not counted" if np.isnan(h) else f"{h:.1f}" for h in table.harmonic]
    for column in [c for c in shown if c.endswith("_minus_first")]:
        bounds = zip(table[column], shown.pop(f"{column}_low"), shown.pop(f"{column}_high"))
        shown[column] = ["" if np.isnan(d) else f"{d:+.1f} [{low:.1f}, {high:.1f}]" for d, low, high in bounds]
    return shown


def number_of(number: int, what: str) -> str:
    """Such as "1 set" or "2 sets"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size_of(sets: Sequence[ImageSet]) -> str:
    """Such as "192 images of 16 sets"."""
    return f"{number_of(sum(map(len, sets)), 'image')} of {number_of(len(sets), 'set')}"


def save_table(table: pd.DataFrame, folder: Path, name: str) -> Path:
    """Writes ``<folder>/tables/<name>.csv``."""
    return write_atomic(folder / "tables" / f"{name}.csv", lambda temporary: table.to_csv(temporary))
