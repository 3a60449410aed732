"""Figures: one look a method, nothing misread, and what a reader who cannot see them is told."""

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from tgazsr_utils import AttackSettings, attention_under_attack, load_dataset
from tgazsr_utils.core.objectives import OBJECTIVES
from tgazsr_utils.display import plots, strips, style, sweeps
from tgazsr_utils.measuring.published import published
from tgazsr_utils.paths import ROOT
from tgazsr_utils.runtime.weights import SHIPPED, read_metadata, training_in_words

ATTACK = AttackSettings(test_eps=4.0, test_stepsize=2.0, test_numsteps=2)
BUILT_IN = {name for name, found in OBJECTIVES.items() if found.terms.__module__.startswith("tgazsr_utils.core")}


@pytest.fixture(scope="module")
def attacked(mini):
    return attention_under_attack(mini, load_dataset("shapes", "test", n=30), ATTACK)


def test_every_method_has_a_look_of_its_own_that_shows_on_white():
    assert BUILT_IN | {"CLIP"} <= style.LOOKS.keys()
    assert len({(look.color, look.marker) for look in style.LOOKS.values()}) == len(style.LOOKS)
    table = [style.LOOKS[name].marker for name in published().index if name != "UCAT"]
    assert len({*table}) == len(table) > 8
    for color in {look.color for look in style.LOOKS.values()} | {*style._FREE_COLORS}:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        assert 1.05 / (np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05) > 3  # WCAG's ratio for graphics


def test_names_of_ones_own_get_the_next_free_pairs_whatever_their_order():
    own = ["Zeta", "Anchored", "TGA-ZSR, Beta 0.009", "TeCoA w=0.5"]
    found = style.looks([*own, "TeCoA"])
    assert found == style.looks(["TeCoA", *own[::-1]]) and list(found) == [*own, "TeCoA"]
    pairs = {(look.color, look.marker) for look in found.values()}
    assert len(pairs) == 5 and not pairs & {
        (look.color, look.marker) for n, look in style.LOOKS.items() if n != "TeCoA"
    }
    assert found["TeCoA w=0.5"].color == found["TeCoA"].color == style.LOOKS["TeCoA"].color
    assert found["TGA-ZSR, Beta 0.009"].color == style.LOOKS["TGA-ZSR"].color


def test_a_method_is_drawn_alike_in_every_figure():
    history = pd.DataFrame({"step": [0, 1], "CE": [2.0, 1.0], "L_AR": [3.0, 2.0], "robust_batch_accuracy": [0.1, 0.2]})
    curves = plots.loss_terms({"TeCoA": history.drop(columns="L_AR"), "TGA-ZSR": history}, "title").axes
    (refinement,) = curves[1].lines  # L_AR, which TeCoA has not
    seeds = {"robust": [40.0, 41.0], "clean": [80.0, 81.0], "average": [60.0, 61.0]}
    half = {f"{kind}_ci": [1.0, 2.0] for kind in seeds}
    table = pd.DataFrame(seeds | half | {"interval": "images"}, index=pd.Index(["TeCoA", "TGA-ZSR"], name="method"))
    points = sweeps.of_ablation("seeds", table, table.reset_index(), "Is it chance?").axes[0].lines
    parts = table.set_axis(pd.Index(["CE", "CE + L_AR"], name="loss"))  # what they train tells how they look
    trained = parts.reset_index().assign(method=table.index)
    points = [*points[::3], *sweeps.of_ablation("loss_parts", parts, trained, "Which part?").axes[0].lines[::3]]
    for name, line in (("TGA-ZSR", refinement), *zip([*table.index, *table.index], points, strict=True)):
        assert (line.get_color(), line.get_marker()) == style.LOOKS[name][:2]
    board = table.assign(clean_ci=1.0)
    dots = [c for c in plots.trade_off(board, "title").axes[0].collections if str(c.get_label()).startswith("T")]
    assert [to_rgb(c.get_facecolor()[0]) for c in dots] == [to_rgb(style.LOOKS[n].color) for n in table.index]


@pytest.mark.parametrize(
    ("value", "text"), [(-0.04, "0.0"), (0.04, "0.0"), (-0.06, "-0.1"), (3.14, "+3.1"), (np.nan, "–")]
)
def test_what_rounds_to_zero_has_no_sign(value, text):
    assert style.signed(value) == text


def test_no_line_of_a_title_or_of_small_print_ends_between_a_number_and_its_unit():
    for width in range(30, 90):
        figure, _ = plots.plt.subplots(figsize=(width / 10, 2))
        style.headed(figure, "Is the loss of TGA-ZSR 95 % of that, ± 3 points?", f"{'so ' * 9}95 % intervals; 44 ± 3")
        for text in (figure.get_suptitle(), figure.get_supxlabel()):
            assert not re.search(r"\d\n%|±\n|\n±|-\n", text)
        plots.plt.close(figure)


def test_a_strip_tells_answers_and_shifts_of_each_model(attacked):
    rows, chosen = attacked.typical_flips(2)
    flipped = attacked.frame[attacked.frame.flipped]
    away = (flipped.l2 - flipped.l2.median()).abs()
    assert set(rows) <= {*flipped.index} and away[rows].max() <= away.drop(rows).min()
    assert chosen == f"shown: 2 whose shift is nearest the median among the {len(flipped)} of 30 images that flip"
    names = [f"class {i}" for i in range(10)]
    figure = strips.attention_strips({"original": attacked, "tuned": attacked}, rows, names, "Does it move?", "small")
    printed = [axis.get_xlabel() for axis in figure.axes if axis.get_visible()]
    for row in rows:
        seen = attacked.frame.loc[row]
        before, after = names[int(seen.clean_prediction)], names[int(seen.attacked_prediction)]
        answers = (
            f"✓ {before} {100 * seen.clean_probability:.0f} %",
            f"✗ {after} {100 * seen.attacked_probability:.0f} %",
        )
        assert all(printed.count(words) >= 2 for words in (*answers, f"shift {seen.l2:.2f}"))
        assert f"original: {answers[0]} becomes {answers[1]}, shift {seen.l2:.2f}" in figure.get_label()
    none = type(attacked)(**vars(attacked) | {"frame": attacked.frame.assign(flipped=False)})
    assert none.typical_flips(50)[0] and "all images: none flips" in none.typical_flips(50)[1]


def test_captions_say_which_model_is_the_tuned_one(tmp_path):
    shipped = strips.tuned_in_words("mini-tga-zsr", SHIPPED["mini-tga-zsr"])
    assert shipped == "tuned: mini-tga-zsr (ships), TGA-ZSR, 2 epochs of 200 steps with 64 images each"
    settings = read_metadata(SHIPPED["mini-tga-zsr"])["settings"]
    assert settings["epochs"] * 12_800 == 2 * 200 * 64  # which data/README.md says it was tuned on
    assert strips.tuned_in_words("some/where.pt", tmp_path / "some" / "where.pt") == "tuned: where.pt"
    assert strips.tuned_in_words("openai", "openai") == "tuned: openai"
    assert training_in_words(SHIPPED["mini"]) == training_in_words(None) == ""


SURROUNDINGS = {
    "latex": {"rc": b"text.usetex: True\nbackend: tkagg\nfont.size: 40"},
    "no rc": {"rc": b"no colon\nbackend: nosuch\nfigure.dpi: many"},
    "latin-1": {"rc": "# Größe".encode("latin-1")},
    "a folder": {"MATPLOTLIBRC": "/"},
    "a display": {"MPLBACKEND": "TkAgg"},
    "no backend": {"MPLBACKEND": "nosuch"},
}
DRAW = """
import sys; from pathlib import Path
import torch; from tgazsr_utils.display import plots, style
style.save(plots.captioned_images(torch.zeros(1, 3, 8, 8), ["a"], "What?"), Path(sys.argv[1]), "a")
"""


@pytest.fixture(scope="session")
def usual_figure(tmp_path_factory):
    return _drawn_in({}, tmp_path_factory.mktemp("usual"))


def _drawn_in(surroundings, folder):
    variables = {"MATPLOTLIBRC": str(folder / "rc"), **surroundings}
    (folder / "rc").write_bytes(variables.pop("rc", b""))
    others = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    command = [sys.executable, "-c", DRAW, folder]
    done = subprocess.run(command, env=others | variables, cwd=ROOT, capture_output=True, text=True)
    return done.stdout, done.stderr, (folder / "figures" / "a.svg").read_bytes()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_figures_are_the_same_in_any_surroundings(name, usual_figure, tmp_path):
    assert _drawn_in(SURROUNDINGS[name], tmp_path) == usual_figure
    assert usual_figure[:2] == ("", "")


def test_a_figure_that_fails_says_so_in_its_place(tmp_path, capsys, monkeypatch):
    plt.close("all")
    picture = style.save(plots.accuracy_bars(pd.DataFrame(), "Does it help?"), tmp_path, "bars")
    assert re.match("accuracy_bars could not be drawn: [A-Z]", picture.alt) and picture.alt in capsys.readouterr().err
    figure = plots.captioned_images(torch.zeros(2, 3, 8, 8), ["a", "b"], "What?", "")
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: 1 / 0)
    assert style.save(figure, tmp_path, "pairs").alt == "pairs could not be drawn: ZeroDivisionError: division by zero"
    assert len(list((tmp_path / "figures").iterdir())) == 4 and not plt.get_fignums()


@pytest.mark.parametrize("clean", [0, 100])
@pytest.mark.parametrize("robust", [0, 100, np.nan])
@pytest.mark.parametrize("methods", [["CLIP"], ["CLIP", "TeCoA"]])
def test_degenerate_accuracies_are_drawn(methods, clean, robust, tmp_path, capsys):
    of = {"clean": clean, "robust": robust, "average": (clean + robust) / 2, "robust_ci": np.nan}
    of |= {"clean_ci": 0.0, "average_ci": 0.0}
    style.save(plots.trade_off(pd.DataFrame([of] * len(methods), index=methods), "What does it cost?"), tmp_path, "a")
    pairs = [(kind, a, b) for kind in ("robust", "clean") for a in methods for b in methods]
    frame = pd.DataFrame(pairs, columns=["kind", "method", "other"])
    difference = robust - robust
    frame = frame.assign(difference=difference, low=difference, high=difference)
    style.save(plots.difference_matrix(frame, "Is it more than chance?"), tmp_path, "b")
    assert "could not be drawn" not in capsys.readouterr().err


def test_a_kept_figure_carries_its_words_in_both_files_and_in_the_notebook(attacked, tmp_path):
    frame = attacked.frame.assign(model="original <1> & $x$")
    picture = style.save(plots.flip_roc(frame, "Does it tell?", "PGD-2; 95 % intervals"), tmp_path, "roc")
    auc = plots.auc_interval(*(frame[frame.clean_correct][c].to_numpy() for c in ("flipped", "l2")))[0]
    assert picture.alt.startswith("Does it tell? PGD-2; 95 % intervals. original <1> & $x$: AUC ")
    assert f"AUC {auc:.2f}" in picture.alt and repr(picture) == picture.alt
    with Image.open(tmp_path / "figures" / "roc.png") as image:
        assert (image.text["Title"], image.text["Description"]) == ("Does it tell?", picture.alt)
        assert [round(dpi) for dpi in image.info["dpi"]] == [300, 300]
    root = ElementTree.parse(tmp_path / "figures" / "roc.svg").getroot()
    told = {name: root.find(f"{{http://www.w3.org/2000/svg}}{name}").text for name in ("title", "desc")}
    assert told == {"title": "Does it tell?", "desc": picture.alt}
    (shown,) = re.findall(r'^<img alt="([^"]*)" ', picture._repr_html_())
    assert shown == picture.alt.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_cells_over_alpha_and_beta_have_their_intervals():
    index = pd.MultiIndex.from_tuples([(0.0, 0.0), (0.08, 0.05)], names=["Alpha", "Beta"])
    kinds = ("robust", "clean", "average")
    values = {kind: [44.0, 50.0] for kind in kinds} | {f"{kind}_ci": [1.5, np.nan] for kind in kinds}
    table = pd.DataFrame(values | {"interval": "images"}, index=index)
    figure = sweeps.of_ablation("alpha_beta", table, table.reset_index(), "How much?", "small")
    assert {text.get_text() for text in figure.axes[0].texts} == {"44.0\n± 1.5", "50.0"}
    assert "Alpha 0, Beta 0: robust 44.0 ± 1.5 %" in figure.get_label()


def test_whiskers_of_the_trade_off_end_within_its_axes_and_no_accuracy_beyond_100():
    kinds = {"robust": [2.0, 45.0], "clean": [97.0, 88.0], "average": [49.5, 66.5]}
    half = {"robust_ci": [9.0, 30.0], "clean_ci": [10.0, np.nan], "average_ci": [5.0, 9.0]}
    axis = plots.trade_off(pd.DataFrame(kinds | half, ["A", "B"]), "title").axes[0]
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    whiskers = [line for bars in axis.containers for line in bars.lines[2]]
    ends = np.concatenate([segment for line in whiskers for segment in line.get_segments()])
    assert len(whiskers) == 4 and left < ends[:, 0].min() and ends[:, 0].max() == 100 < right
    assert bottom < ends[:, 1].min() == 0 and ends[:, 1].max() == 75 < top


def test_the_heatmap_marks_the_set_that_was_tuned_on():
    rows = [("A", key, kind, 50.0, 0) for key in ("shapes", "letters") for kind in ("robust", "clean")]
    frame = pd.DataFrame(rows, columns=["method", "dataset", "kind", "accuracy", "seed"])
    names = lambda figure: [label.get_text() for label in figure.axes[1].get_xticklabels()]
    figure = plots.accuracy_heatmap(frame, "How accurate?", "small", "shapes")
    assert names(figure) == ["★ shapes", "letters", "MEAN"]
    assert figure.get_label().startswith("How accurate? small; ★ shapes: the set that is tuned on. mean")
    figure = plots.accuracy_heatmap(frame, "How accurate?", "small", "elsewhere")
    assert names(figure) == ["shapes", "letters", "MEAN"] and "★" not in figure.get_label()


def of_two_rates(intervals):
    index = pd.MultiIndex.from_product([["TeCoA", "TGA-ZSR"], [1e-3, 1e-4]], names=["method", "lr"])
    values = {kind: [40.0, 41.0, 42.0, 43.0] for kind in ("robust", "clean", "average")}
    return pd.DataFrame(values | {f"{kind}_ci": [9.0] * 4 for kind in values} | {"interval": intervals}, index=index)


def test_two_seeds_are_dots_without_an_interval():
    table = of_two_rates("2 seeds").xs(1e-3, level="lr")
    seeds = pd.concat([table.reset_index().assign(robust=value) for value in (30.0, 50.0)])
    of = lambda frame: sweeps.of_ablation("seeds", frame, seeds, "How much is chance?", "mean over 2 sets")
    two, three = of(table), of(table.assign(interval="3 seeds"))
    widths = [[np.ptp(bars.lines[2][0].get_segments()[0][:, 0]) for bars in f.axes[0].containers] for f in (two, three)]
    assert widths == [[0, 0], [18, 18]]
    told = "means of two seeds, which are dots: too few for an interval"
    assert told in two.get_label() and "95 %" not in two.get_label() and "±" not in two.get_label()
    assert "95 % intervals over 3 seeds" in three.get_label() and told not in three.get_label()
    dots = [line for line in two.axes[0].lines if line.get_color() == "black"]
    assert sorted(np.concatenate([line.get_xdata() for line in dots])) == [30, 30, 50, 50]


def test_learning_rates_are_curves_on_a_scale_that_can_be_read():
    figure = sweeps.of_ablation("learning_rate", of_two_rates("images"), None, "Which learning rate? One grid for all.")
    figure.draw_without_rendering()
    axis = figure.axes[0]
    assert [bars.lines[0].get_xdata().tolist() for bars in axis.containers] == 2 * [[1e-4, 1e-3]]
    assert {"0.001", "0.0001"} <= {label.get_text() for label in axis.get_xticklabels()}
    assert figure.get_label().startswith("Which learning rate? 95 % intervals over images. One grid for all. TeCoA at")


def test_budgets_rise_in_shades_of_the_methods_colour_and_stand_beside_each_other():
    trained = pd.Series([3.5, 7.0, 1.75, "CLIP"], dtype=object)
    rows = [(a, 2, b, 10, 40.0, 5.0) for a in trained for b in (3.5, 7.0)] + [(3.5, 5, 3.5, 10, 40.0, 5.0)]
    columns = ["train_eps", "train_numsteps", "test_eps", "test_numsteps"]
    table = pd.DataFrame(rows, columns=[*columns, "robust", "robust_ci"]).set_index(columns)
    axis = sweeps.budgets(table, "How?").axes[0]
    lines = [bars.lines[0] for bars in axis.containers]
    assert [bars.get_label() for bars in axis.containers] == [f"trained at {e:g}/255" for e in (1.75, 3.5, 7)] + [
        "CLIP"
    ]
    assert [to_rgb(lines[n].get_color()) for n in (1, 3)] == [to_rgb(style.LOOKS[n].color) for n in ("TGA-ZSR", "CLIP")]
    darker = [sum(to_rgb(line.get_color())) for line in lines[:3]]
    assert darker == sorted(darker, reverse=True) and len({line.get_marker() for line in lines[:3]}) == 3
    assert len({line.get_xdata()[0] for line in lines}) == 4
