"""The notebooks' closing sentences: yes, no and undecided follow from the numbers."""

import numpy as np
import pandas as pd
import pytest
from test_holding import record

from tgazsr_utils import open_workbook, workbook
from tgazsr_utils.measuring import answers
from tgazsr_utils.measuring.holding import ALL
from tgazsr_utils.measuring.loss_mixture import TermGradients, cosines, mixture
from tgazsr_utils.measuring.tables import leaderboard, size_of
from tgazsr_utils.profiles import default_parameters

NO_AREA = 3 * (float("nan"),)


def measured(seed=0, **right):
    """Records of each method on two sets of 40 images: how many are right under attack, and when clean."""
    rows = []
    for method, (robust, clean) in right.items():
        for key in ("tuned", "other"):
            for attack, n in (("none", clean), ("pgd", robust)):
                one = record(method.replace("_", "-"), attack, n * [1] + (40 - n) * [0], key)
                rows.append(one.model_copy(update={"seed": seed, "settings": {}}))
    return rows


@pytest.mark.parametrize(
    "clean, attacked, said",
    [(90, 3, "Yes"), (90, 80, "No"), (20, 1, "No"), (52, 12, "Undecided"), (90, 22, "Undecided")],
)
def test_a_model_is_accurate_and_fragile_or_not(clean, attacked, said):
    table = pd.DataFrame({"clean": 4 * [clean], "eps 1": 4 * [clean], "eps 2": 4 * [attacked], "eps 4": 4 * [attacked]})
    sentence = answers.pretraining(table.astype(float), 4 * [100])
    assert sentence.startswith(f"{said}: ") and f"on {clean:.1f} [" in sentence.replace("right on", "on")
    assert ("epsilon 2/255" in sentence) == (said == "Yes" or clean == 20)  # the first that takes it, else the largest


def shifts(tuned, n=50):
    rng = np.random.default_rng(0)
    frames = [pd.DataFrame({"model": name, "l2": mean + rng.random(n)}) for name, mean in tuned.items()]
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("tuned, said", [(0.2, "Yes"), (2.0, "No"), (1.01, "Undecided")])
def test_attention_stays_moves_more_or_neither(tuned, said):
    frame = shifts({"original": 1.0, "tuned": tuned})
    sentence = answers.attention_shift(frame, {"original": (0.89, 0.84, 0.93), "tuned": NO_AREA})
    assert sentence.startswith(f"{said}: the attack moves attention by {frame.l2[:50].mean():.2f} [")
    assert f"after tuning by {frame.l2[50:].mean():.2f} [" in sentence and "50 images" in sentence
    assert "the shift tells which answers flip, AUC 0.89 [0.84, 0.93]" in sentence


def test_what_is_not_there_is_said_and_decides_nothing():
    frame = shifts({"original": 1.0})
    assert answers.attention_shift(frame, {"original": (0.6, 0.4, 0.8)}).startswith("Undecided: ")
    assert "is not shown to tell which answers flip, AUC 0.60" in answers.attention_shift(
        frame, {"original": (0.6, 0.4, 0.8)}
    )
    assert "moves more where answers stay" in answers.attention_shift(frame, {"original": (0.2, 0.1, 0.3)})
    few = answers.attention_shift(frame, {"original": (1.0, 1.0, 1.0)})
    assert "is not shown to tell which answers flip, AUC 1.00" in few
    assert "no answers to tell apart" in answers.attention_shift(frame, {"original": NO_AREA})
    untrusted = [r for r in measured(CLIP=(2, 38), TGA_ZSR=(20, 36)) if r.attack == "none" or r.method == "CLIP"]
    table = leaderboard(untrusted)
    assert answers.fine_tuning(untrusted, ["TGA-ZSR"]).startswith("Undecided: robust accuracy of TGA-ZSR")
    assert answers.evaluation(untrusted, table, ["TGA-ZSR"], "tuned").startswith("Undecided: robust accuracy is not")
    assert answers.evaluation(untrusted, table, [], None).startswith(
        "Undecided: robust accuracy is not counted for TGA-"
    )
    alone = measured(CLIP=(2, 38))
    assert answers.evaluation(alone, leaderboard(alone), [], None).startswith("Undecided: nothing was tuned here; of 1")
    assert answers.ablations(None, {}, "TGA-ZSR", "TeCoA") == "Undecided: seeds were not compared."


@pytest.mark.parametrize("robust, said", [(20, "Yes"), (2, "No"), (10, "Undecided")])
def test_tuning_helps_harms_or_neither(robust, said):
    clip = {"Yes": 2, "No": 20, "Undecided": 10}[said]
    records = measured(CLIP=(clip, 38), TeCoA=(robust - 1, 36), TGA_ZSR=(robust, 36))
    sentence = answers.fine_tuning(records, ["TeCoA", "TGA-ZSR"])
    assert sentence.startswith(f"{said}: under attack TGA-ZSR is right on {2.5 * robust:.1f} % of held-out images")
    assert f"untuned model is on {2.5 * clip:.1f} % ({2.5 * (robust - clip):+.1f} points [" in sentence
    assert "clean ones -5.0 points [" in sentence
    assert "compared with TeCoA that is +2.5 points [" in sentence and sentence.endswith(
        "which may be chance: what TGA-ZSR adds to it is not shown to do it."
    )

    table = leaderboard(measured(Best=(30, 40)) + records)
    found = answers.evaluation(records, table, ["TeCoA", "TGA-ZSR"], "tuned")
    assert found.startswith(f"{said}: on 1 set that it was not tuned on, TGA-ZSR is right on {2.5 * robust:.1f} %")
    assert "of 3 models the best average has " in found and "has Best" not in found
    assert found.endswith(" (without Best: given weights may be tuned on anything).")
    given = answers.evaluation(
        measured(Best=(30, 40)) + records, table, [], None
    )  # nothing tuned: of the best of those that were given
    assert given.startswith(
        "Yes: on 2 sets (on which its weights were tuned is not known here), Best is right on 75.0 %"
    )
    both = answers.evaluation(measured(Best=(30, 40)) + records, table, ["Best", "TGA-ZSR"], None)
    assert "of 3 models the best average has Best, 87.5 ± " in both and "and TGA-ZSR is number " in both


@pytest.mark.parametrize(
    "of_seeds, said",
    [
        ({0: (3, 1, 5), 1: (2, 1, 3)}, "Yes"),
        ({0: (-3, -5, -1), 1: (-2, -3, -1)}, "Yes"),
        ({0: (3, 1, 5), 1: (-2, -3, -1)}, "No"),
        ({0: (3, 1, 5), 1: (2, -1, 5)}, "Undecided"),
        ({0: (3, 1, 5)}, "Undecided"),
    ],
)
def test_another_seed_tells_the_same_or_not(of_seeds, said):
    ends = ["robust_minus_first", "robust_minus_first_low", "robust_minus_first_high"]
    parts = pd.DataFrame([NO_AREA, (3.0, 1.0, 5.0), (1.0, -2.0, 4.0)], ["CE", "CE + L_AR", "CE + L_AMC"], ends)
    sentence = answers.ablations(parts, of_seeds, "TGA-ZSR", "TeCoA")
    assert sentence.startswith(f"{said}: in robust accuracy TGA-ZSR differs from TeCoA by ")
    assert "with seed 0" in sentence and "compared with CE alone, CE + L_AR by +3.0 points [+1.0, +5.0]" in sentence
    assert sentence.endswith("beyond chance for CE + L_AR.")
    assert answers.ablations(parts.iloc[[0, 2]], of_seeds, "A", "B").endswith("none of it beyond chance.")


def test_differences_of_seeds_are_of_those_that_both_have():
    records = measured(0, TeCoA=(10, 40), TGA_ZSR=(20, 40)) + measured(1, TeCoA=(10, 40), TGA_ZSR=(5, 40))
    found = answers.of_seeds(records + measured(2, TeCoA=(1, 40)), "TGA-ZSR", "TeCoA")
    assert answers.of_seeds(records, "TeCoA", "TeCoA") == {}
    assert {seed: round(of[0], 1) for seed, of in found.items()} == {0: 25.0, 1: -12.5}


@pytest.mark.parametrize(
    "robust, clean, said",
    [
        ((-2.0, -4.0, -1.0), (-0.04, -2.0, 2.0), "Yes"),
        ((-0.0, -0.5, 0.5), (0.2, -0.3, 0.7), "No"),
        ((-2.0, -4.0, 1.0), (0.0, -2.0, 2.0), "Undecided"),
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), "Undecided"),  # of images so few that none changes
        (NO_AREA, (9.0, 8.0, 10.0), "Yes"),
        (NO_AREA, NO_AREA, "Undecided"),
    ],
)
def test_the_attention_terms_change_what_comes_out_or_not(robust, clean, said):
    """Of places (0.08, 0.05), (0, 0) and (0.08, 0), each by how much it differs from the first."""
    better = (0.5, -1.0, 2.0), (1.5, 1.0, 2.0)
    rows = [(0.08, 0.05, 64.0, *NO_AREA, *NO_AREA), (0, 0, 60.0, *robust, *clean), (0.08, 0, 65.0, *sum(better, ()))]
    ends = [f"{kind}_minus_first{end}" for kind in ("robust", "clean") for end in ("", "_low", "_high")]
    sweep = pd.DataFrame(rows, columns=["Alpha", "Beta", "average", *ends])
    products = np.array([[9.0, -30.0, 0.0], [-30.0, 400.0, 0.0], [0.0, 0.0, 0.0]])
    terms = TermGradients((1.0, 10.0, 0.0), products)
    mixed = mixture(terms, 0.1, 0.05), cosines(terms)
    sentence = answers.explorer(*mixed, sweep, "kept", {"original": 1.286, "tuned": 0.4})
    assert sentence.startswith(f"{said}: Alpha 0.08 and Beta 0.05 ") and "-0.0 " not in sentence
    if said == "Yes" and robust is not NO_AREA:
        gains = "robust accuracy by +2.0 points [+1.0, +4.0] and clean accuracy by +0.0 points [-2.0, +2.0]"
        assert f"change {gains}, compared with neither term; of 3 places measured (0.08, 0) has" in sentence
    assert "+0.5 points [-1.0, +2.0], clean +1.5 points [+1.0, +2.0], beyond chance in clean accuracy (k" in sentence
    assert " At Alpha 0.1 and Beta 0.05, of the loss: CE 50 %, L_AR 50 %, L_AMC 0 %. The gradient of L_AR " in sentence
    assert sentence.endswith(" attention by 1.29 (original), 0.40 (tuned).")
    alone = answers.explorer(*mixed, sweep[:1], "kept", {})
    assert alone.startswith("Undecided: ") and "of 1 places measured none has a better average" in alone
    none = answers.explorer(*mixed, None, "no sweep is recorded", {})
    assert none.startswith("Undecided: no sweep is recorded. At Alpha 0.1 ") and "image shown" not in none


@pytest.mark.parametrize("lost, said", [((0.0, 0.0, 0.0), "Yes"), ((-9, -15, -3), "No"), ((-3, -8, 2), "Undecided")])
def test_robustness_is_real_or_not(lost, said):
    rows = {("CLIP", "pgd"): (5.0, *NO_AREA), ("CLIP", ALL): (0.0, -5.0, -8.0, -2.0)}
    rows |= {("TGA-ZSR", "pgd"): (40.0, *NO_AREA), ("TGA-ZSR", ALL): (40.0 + lost[0], *lost)}
    ends = ["robust", "robust_minus_first", "robust_minus_first_low", "robust_minus_first_high"]
    table = pd.DataFrame(rows, ends).T
    sentence = answers.holds(table, 1600)
    assert said != "Undecided" or "-3.0 points [-8.0, +0.0] on" in sentence  # more attacks win nothing
    assert said != "Yes" or answers.holds(table, 16).startswith("Undecided: ")  # so few images show nothing
    assert sentence.startswith(f"{said}: TGA-ZSR is right on 40.0 % of images under pgd and on {40 + lost[0]:.1f} %")
    assert answers.holds(table.assign(robust=np.nan), 16).startswith("Undecided: robust accuracy of TGA-ZSR is not")


def test_the_run_keeps_the_sentence_and_headings_say_where_better_is(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(workbook, "display", lambda one: shown.append(one.data))
    values = default_parameters("01_attention_shift") | {"output": str(tmp_path / "out")}
    book = open_workbook("01_attention_shift", values)
    book.answer("Yes: it does.")
    assert shown == ["**Yes:** it does."]
    kept = tmp_path / "out" / "answers" / "01_attention_shift.txt"
    assert kept.read_text(encoding="utf-8") == "Yes: it does.\n"
    table = answers.headed(pd.DataFrame({"robust": [1], "l2": [2], "mine": [3]}))
    assert [*table] == ["robust, % ↑", "attention moved (l2) ↓", "mine"]


def test_one_image_of_one_set_is_said_so(shapes):
    """And has no interval."""
    assert size_of([shapes.subset(1)]) == "1 image of 1 set" and size_of([shapes] * 30) == "1,200 images of 30 sets"
    nan, index = float("nan"), pd.MultiIndex.from_product([["TGA-ZSR"], ["pgd", ALL]])
    row = {"robust": 100.0, "robust_minus_first": 0.0, "robust_minus_first_low": nan, "robust_minus_first_high": nan}
    said = answers.holds(pd.DataFrame([row, row], index=index), 1)
    assert said.startswith("Undecided: ") and said.endswith(", +0.0 points on 1 image.")
