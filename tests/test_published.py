"""Published, independent and own numbers: each as its source has it, in its own column; ours only where comparable."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.core.objectives import OBJECTIVES
from tgazsr_utils.datasets.published_sets import DATASETS
from tgazsr_utils.display import plots
from tgazsr_utils.measuring import published as results
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import leaderboard
from tgazsr_utils.paths import DATA

PAPER, UCAT = "TGA-ZSR paper, NeurIPS 2024", "UCAT paper, ICML 2026 (arXiv 2512.12997), Table 16"
ATTACKS = {"PGD": "pgd-100", "CW": "cw-100", "AutoAttack": "apgd-100"}


def record(method, key, attack, accuracy, n=10_000):
    """As it would be if a model recognised so many percent of a published set, measured as published."""
    correct = round(accuracy * n / 100)
    attacked = {} if attack == "none" else {"test_stepsize": 1.0}
    return Record(
        key=f"{method}-{key}-{attack}",
        method=method,
        model=method,
        arch="ViT-B-32-quickgelu",
        world="photographs",
        dataset=key,
        data=key,
        attack=attack,
        eps_255=float(attack != "none"),
        protocol="worst" if attack.startswith("apgd") else "last",
        seed=0,
        n=n,
        available=n,
        published=True,
        correct=correct,
        hits=np.packbits(np.arange(n) < correct).tobytes().hex(),
        settings=attacked,
        code="",
        device="cpu",
        seconds=0,
        time="",
    )


def as_in(source, methods, kind="PGD", sets=tuple(DATASETS)):
    """Records with exactly the accuracies of a source, clean and under an attack."""
    rows = results.by_set().loc[source]
    measured = {"clean": "none", kind: ATTACKS[kind]}.items()
    each = product(methods, measured, sets)
    return [record(method, key, label, rows.loc[(column, method), key]) for method, (column, label), key in each]


def beside(records):
    return results.beside(records, "openai", "tinyImageNet")


def mini_records():
    lines = (DATA / "reference" / "mini" / "records.jsonl").read_text().splitlines()
    return [Record.model_validate_json(line) for line in lines]


def test_the_sets_are_the_sixteen_and_no_accuracy_is_missing():
    table = results.by_set()
    assert list(table) == list(DATASETS) and len(table) * 16 == 864
    assert table.notna().all(axis=None) and table.ge(0).all(axis=None) and table.le(100).all(axis=None)
    assert set(table.index.unique("source")) == {PAPER, UCAT} == set(results.COLUMNS) - {"Comp-TGA paper, TPAMI 2026"}


def test_printed_means_are_those_of_their_rows_but_for_two():
    """REFERENCE section 5; and one number among the sets that looks copied."""
    wrong = results.misprints()
    assert list(wrong.index) == [(PAPER, "CW", "CLIP"), (PAPER, "clean", "TGA-ZSR")]
    assert wrong.round(2).to_numpy().tolist() == [[3.64, 2.64, 1.0], [56.44, 56.38, 0.06]]
    rest = results.means().drop(wrong.index).dropna()
    assert len(rest) == 54 - 4 - 2 and (rest.printed - rest.of_sets).abs().max() < 0.0075
    clean = results.by_set().xs(("clean", "CLIP"), level=("attack", "method"))
    assert clean.loc[PAPER, "tinyImageNet"] == clean.loc[PAPER, "SUN397"] == clean.loc[UCAT, "SUN397"] == 57.26
    assert clean.loc[UCAT, "tinyImageNet"] == 57.96


def test_each_number_stands_in_the_column_of_its_source():
    table, file = results.published(), pd.read_csv(DATA / "published_table.csv")
    means = results.means()
    for kind, source, method in product(ATTACKS.keys() | {"clean"}, results.SOURCES, table.index):
        cell, row = table.loc[method, (kind, source)], file[file.source.map(results.COLUMNS).eq(source)]
        row = row[row.method == method]
        if len(row) and not np.isnan(row[kind].item()):
            assert cell == row[kind].item()
        else:  # not printed as far as we know: the mean of the row, or nothing
            index = (PAPER if source == "paper" else UCAT, kind, method)
            assert cell == means.of_sets.get(index, np.nan) or (np.isnan(cell) and index not in means.index)
    assert table.loc["TGA-ZSR", "PGD"].tolist() == [42.09, 31.55] and table.loc["TGA-ZSR", "clean"].tolist() == [
        56.44,
        49.91,
    ]
    assert table.loc["TGA-ZSR", "average"].tolist() == pytest.approx([49.27, 40.73], abs=0.0051)
    assert np.isnan(table.loc["UCAT", ("PGD", "paper")]) and np.isnan(table.loc["FT-Clean", ("PGD", "UCAT")])


def test_every_row_of_the_papers_table_can_be_trained():
    rows = results.published()["PGD", "paper"].dropna()
    of_our_own = {"Vision-based-grad", "PMG-AFT-scaled", "FARE-RobustVLM"}
    of_our_own |= {"Sim-CLIP", "UCAT", "AGFT", "SAFT", "AdvFLYP"}  # since then
    assert set(rows.index) - {"CLIP"} == set(OBJECTIVES) - of_our_own


@pytest.mark.parametrize("kind", ATTACKS)
def test_ours_stand_beside_the_same_attack(kind):
    methods = ["CLIP", "TGA-ZSR"]
    table = beside(
        [
            *as_in(PAPER, methods, kind),
            *(r.model_copy(update={"method": "Mine", "model": "mine"}) for r in as_in(PAPER, ["CLIP"], kind)),
        ]
    )
    theirs = results.published()
    pd.testing.assert_frame_equal(table.loc[theirs.index, theirs.columns], theirs)
    ours = {column[0] for column in table if column[1] == "ours"}
    assert ours == {"clean", kind} | ({"average"} if kind == "PGD" else set())
    of_sets = results.means().of_sets[PAPER]
    for method, column in product(methods, ("clean", kind)):
        row = table.loc[method, column]
        assert row.ours == pytest.approx(of_sets[column, method]) and row["ours ±"] > 0
        assert [row["ours - paper"], row["ours - UCAT"]] == pytest.approx([row.ours - row.paper, row.ours - row.UCAT])
    assert table.loc["Mine", (kind, "ours")] == table.loc["CLIP", (kind, "ours")] and np.isnan(
        table.loc["Mine", (kind, "paper")]
    )
    assert table.loc["CLIP", "ours"].tolist() == ["16", "160,000"] and table["ours"].isna().all(axis=1)["FARE"]


def test_where_some_sets_are_missing_every_column_is_over_the_others():
    sets = ["cifar10", "dtd", "PCAM"]
    table = beside(as_in(UCAT, ["TeCoA", "Comp-TGA"], sets=sets))
    rows = results.by_set().loc[UCAT][sets].mean(axis=1)
    for kind, method in product(("clean", "PGD"), ("TeCoA", "Comp-TGA")):
        assert table.loc[method, (kind, "UCAT")] == pytest.approx(rows[kind, method])
        assert table.loc[method, (kind, "ours - UCAT")] == pytest.approx(0, abs=1e-9)
    assert np.isnan(table.loc["Comp-TGA", ("PGD", "paper")])  # whose paper's sets are not known here
    assert table.loc["TeCoA", ("ours", "sets")] == "3 of 16"


def test_ours_stay_away_where_anything_differs_from_what_was_published(capsys):
    records, theirs = as_in(PAPER, ["CLIP"], sets=["cifar10", "dtd"]), results.published()
    assert ("PGD", "ours") in beside(records)
    for other in (
        {"protocol": "worst"},
        {"published": False},
        {"arch": "ViT-B-32-256"},
        {"world": PLUMBING},
        {"settings": {"test_stepsize": 2.0}},
        {"eps_255": 2.0},
        {"attack": "pgd-10"},
        {"attack": "pgd-100-l2"},
        {"attack": "standard", "protocol": "worst"},
        {"attack": "apgd-t-100", "protocol": "worst"},
    ):
        capsys.readouterr()
        pd.testing.assert_frame_equal(beside([*records, records[-1].model_copy(update=other)]), theirs)
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith("not comparable with the published table: ")
    pd.testing.assert_frame_equal(results.beside(records, "laion2b_s34b_b79k", "tinyImageNet"), theirs)
    further = [r.model_copy(update={"dataset": "ImageNet-R", "data": "ImageNet-R"}) for r in records[::2]]
    pd.testing.assert_frame_equal(beside([*records, *further]), beside(records))
    pd.testing.assert_frame_equal(beside(further), theirs)
    with pytest.raises(ValueError, match="differ in attack"):
        beside([*records, *as_in(PAPER, ["CLIP"], "CW", sets=["cifar10", "dtd"])[2:]])


def test_numbers_of_the_mini_world_never_stand_beside_published_ones(capsys):
    table = results.beside(mini_records(), "mini", "shapes")
    pd.testing.assert_frame_equal(table, results.published())
    assert (
        capsys.readouterr().out == "not comparable with the published table: mini weights tuned on shapes; mini-world\n"
    )
    assert results.points(table) == {}


def test_orders_are_compared_over_the_methods_in_common():
    """Also the mini-world's, as its README has it: +0.76 over nine methods."""
    table = results.ranks(leaderboard(mini_records()))
    lines = results.agreement(table).splitlines()
    assert lines == [
        "here and paper: rank correlation +0.76 over 9 methods; best: FARE (here), Comp-TGA (paper)",
        "here and UCAT: rank correlation +0.07 over 7 methods; best: FARE (here), UCAT (UCAT)",
        "paper and UCAT: rank correlation +0.66 over 6 methods; best: Comp-TGA (paper), PMG-AFT (UCAT)",
    ]
    assert table.loc[["TeCoA", "Vision-based"], ("here and paper", "here")].tolist() == [6.5, 6.5]  # equal in all seeds
    both = ["FARE", "PMG-AFT", "TGA-ZSR", "UCAT", "Comp-TGA", "TeCoA", "CLIP"]
    assert table["here and UCAT"].dropna().index.tolist() == both
    readable = results.readable(table, digits=1)
    assert "Sim-CLIP" not in table.index and readable.loc["FT-Clean", ("here and UCAT", "UCAT")] == ""


def test_the_papers_own_order_is_the_papers():
    methods = ["CLIP", "FT-Clean", "FT-Adv.", "TeCoA", "FARE", "PMG-AFT", "Vision-based", "TGA-ZSR"]
    board = leaderboard(as_in(PAPER, methods))
    assert "here and paper: rank correlation +1.00 over 8 methods" in results.agreement(results.ranks(board))
    few = results.agreement(results.ranks(board.loc[["CLIP", "TeCoA"]]))
    assert "here and paper: no order to compare (2 methods in common)" in few
    alike = results.agreement(results.ranks(board.assign(average=50.0)))
    assert "here and paper: no order to compare (8 methods in common)" in alike
    unknown = results.agreement(results.ranks(board.assign(average=np.nan)))
    assert "here and paper: no order to compare (0 methods in common)" in unknown


def shown(axis):
    """Where the points of each look are: (face, edge) -> [[x, y], ...]."""
    points = [c for c in axis.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
    return {c: np.asarray(c.get_offsets()) for c in points}


def test_published_points_are_grey_and_joined_to_ours():
    records = as_in(PAPER, ["CLIP", "TeCoA"])
    board = leaderboard(records)
    points = results.points(beside(records))
    assert list(points) == ["paper", "UCAT"] and points["UCAT"].loc["TeCoA"].round(3).tolist() == [29.86, 43.83, 36.845]
    axis = plots.trade_off(board, "title", points).axes[0]
    hollow = {}  # by the grey of their edge
    for points_of_one, at in shown(axis).items():
        if not len(points_of_one.get_facecolor()):
            red, green, blue, _ = points_of_one.get_edgecolor()[0]
            assert red == green == blue
            hollow.setdefault(float(red), []).append(at[0].tolist())
    theirs = results.published().loc[board.index]
    for grey, source in ((0.2, "paper"), (0.55, "UCAT")):
        assert hollow.pop(grey) == theirs[[("clean", source), ("PGD", source)]].to_numpy().tolist()
    assert not hollow
    sizes = [c.get_sizes()[0] for c in shown(axis)]
    averages = [*board.average, *theirs["average"].to_numpy().ravel()]
    assert max(sizes) / min(sizes) == pytest.approx(max(averages) / min(averages))


def test_the_figure_of_sources_shows_each_number_once():
    for table in (results.published(), beside(as_in(UCAT, ["CLIP", "TGA-ZSR"], "AutoAttack"))):
        figure = plots.sources(table, "title")
        for axis, kind in zip(figure.axes, ("clean", "PGD", "CW", "AutoAttack")):
            drawn = np.concatenate([at[:, 0] for at in shown(axis).values()])
            theirs = table[kind][["UCAT", "paper"]].to_numpy().ravel("F")
            np.testing.assert_array_equal(drawn[~np.isnan(drawn)], theirs[~np.isnan(theirs)])
        assert "-10.5" in {text.get_text() for text in figure.axes[1].texts}
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels == ["UCAT's", "paper's"] + ["ours"] * (("clean", "ours") in table)


def test_the_readmes_sentences_on_42_09_are_the_numbers_of_the_tables():
    text = " ".join(
        (DATA / "reference" / "mini" / "README.md").read_text().split("## What is known about 42.09")[1].split()
    )
    row = results.published().loc["TGA-ZSR"]
    for kind, source in product(("PGD", "clean", "AutoAttack"), results.SOURCES):
        assert f"{row[kind, source]:.2f}" in text
    rows = results.by_set().xs(("AutoAttack", "TGA-ZSR"), level=("attack", "method"))
    assert f"within {(rows.loc[PAPER] - rows.loc[UCAT]).abs().max():.1f} points" in text


CLIP = {"CLIP": "openai"}


def wilson(correct, n, z=1.959964):
    """By hand, in percent."""
    p, middle = correct / n, (correct + z * z / 2) / (n + z * z)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (middle - half), 100 * (middle + half)


def test_a_verdict_says_whether_the_published_number_lies_in_our_interval():
    """CIFAR-10 under PGD: 2.42 in the paper, 9.57 by UCAT's authors."""
    seen = set()
    for correct in range(0, 140):
        measured = record("CLIP", "cifar10", "pgd-100", correct / 10, n=1000)
        table = results.verdicts([measured], CLIP).set_index("source")
        low, high = wilson(correct, 1000)
        assert table.published.to_dict() == {"paper": 2.42, "UCAT": 9.57}
        assert table[["low", "high"]].to_numpy() == pytest.approx(np.array(2 * [(low, high)]), abs=1e-4)
        for source, number in table.published.items():
            inside = low - 0.005 <= number <= high + 0.005
            assert table.verdict[source] == ("agrees" if inside else "differs")
        seen.add(tuple(table.verdict))
    assert len(seen) == 3  # with one of them, with the other, with none


def test_a_verdict_at_the_edge_and_beyond():
    """AutoAttack leaves 0.00 % of the pets by the paper; a bound below 0.005 is what the rounding of that hides."""
    judge = lambda key, attack, correct, n: (
        results.verdicts([record("CLIP", key, attack, 100 * correct / n, n=n)], CLIP)
        .set_index("source")
        .verdict["paper"]
    )
    assert judge("oxfordpet", "apgd-100", 0, 1000) == "agrees"
    assert wilson(1, 1000)[0] > 0.005 and judge("oxfordpet", "apgd-100", 1, 1000) == "differs"
    assert wilson(1, 8000)[0] < 0.005 and judge("oxfordpet", "apgd-100", 1, 8000) == "agrees"
    assert judge("STL10", "none", 1000, 1000) == "differs" and judge("STL10", "none", 970, 1000) == "agrees"


def test_verdicts_compare_what_is_comparable_alone():
    hub = "hf-hub:chs20/FARE4-ViT-B-32-laion2B-s34B-b79K"
    weights = CLIP | {"FARE-4": hub, "mine": "mine.pt"}
    measured = as_in(PAPER, ["CLIP"], sets=["cifar10", "dtd"]) + [record("CLIP", "dtd", "apgd-100", 0.16, n=1000)]
    given = [
        record(name, "dtd", a, 50.0, n=1000)
        for name in ("FARE-4", "mine", "trained")
        for a in ("none", "pgd-100", "apgd-t-100")
    ]
    given = [r.model_copy(update={"arch": "ViT-B-32"}) for r in given]
    table = results.verdicts([*measured, *given], weights)
    assert set(table.method) == {"CLIP", "FARE-4", "mine"}  # what is trained here has no weights that others have
    own = table[table.method == "CLIP"]
    assert len(own) == 2 * (2 * 2 + 1) and set(own[own.source == "paper"].verdict) == {"agrees"}
    robust = table[table.method == "FARE-4"].set_index("attack")
    assert robust.published.fillna(-1).to_dict() == {"none": 53.8, "pgd-100": -1, "apgd-t-100": 44.4}
    assert set(robust.verdict) == set(table[table.method == "mine"].verdict) == {"no number for these sets"}
    assert robust.source["none"] == "RobustVLM, its README, mean of 13 sets" and robust.source["pgd-100"] == ""
    at_four = given[2].model_copy(update={"eps_255": 4.0})
    assert results.verdicts([at_four], weights).published.tolist() == [21.2]
    for changes, verdict in (
        ({"eps_255": 2.0}, "pgd-100, epsilon 2/255, step 1/255, protocol last"),
        ({"published": False}, "dtd is not as published"),
        ({"arch": "ViT-B-32"}, "ViT-B-32"),
        ({"world": PLUMBING}, PLUMBING),
    ):
        row = results.verdicts([record("CLIP", "dtd", "pgd-100", 2.0).model_copy(update=changes)], CLIP).squeeze()
        assert row.verdict == verdict and np.isnan(row.published)
    nothing = results.verdicts(mini_records(), CLIP)
    assert nothing.empty and "verdict" in nothing
