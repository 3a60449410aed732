"""Checks of the attack: sound models pass; of models that hide their gradients, robust accuracy is not counted."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import only_long

from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.display import plots, style, sweeps
from tgazsr_utils.display.panels import sweep_svg
from tgazsr_utils.measuring import tables as results
from tgazsr_utils.measuring import trust as sanity
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.measuring.tables import differences, leaderboard, readable
from tgazsr_utils.runtime.weights import load_clip

ATTACK = AttackSettings(test_eps=3.5, test_stepsize=1, test_numsteps=3)


@pytest.fixture(scope="module")
def sets():
    return [load_dataset(key, "test", n=8) for key in ("shapes", "letters")]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sanity, "STEPS", (1, 3))
    monkeypatch.setattr(sanity, "LARGE_STEPS", 8)
    monkeypatch.setattr(sanity, "QUERIES", 5)


class Nowhere(torch.autograd.Function):
    """Gradients of other pixels' making, as of a model that is not what it is differentiated through."""

    @staticmethod
    def forward(context, pixels):
        return pixels.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient.flip(0, 2, 3).roll(7, 3) * torch.randn(
            gradient.shape, generator=torch.Generator().manual_seed(0)
        )


def masked(clip, change):
    copy = clip.frozen_copy()
    copy.visual.register_forward_pre_hook(lambda module, given: (change(given[0]),))
    next(copy.visual.parameters()).data += 1e-6  # another model to the store
    return copy


steps_of = lambda check: {outcome.attack: outcome for outcome in check.outcomes}


@pytest.mark.parametrize("weights", ["mini", *only_long("mini-tga-zsr")])
def test_a_sound_model_passes(weights, sets):
    check = sanity.check_attack(load_clip("mini-clip", weights, "cpu"), sets, ATTACK)
    assert check.problems == [] and check.zero_gradients == 0 and check.n == 16
    done = steps_of(check)
    assert list(done) == ["clean", "noise", sanity.MEASURED, "PGD-1", "PGD-10", "PGD-100", "Square", *sanity.LARGE]
    assert (
        done["noise"].loss
        < done["PGD-1"].loss
        < done["PGD-10"].loss
        < done["PGD-100"].loss
        < done[sanity.LARGE[0]].loss
    )
    assert done["PGD-100"].correct < done["Square"].correct <= done["clean"].correct
    assert [(done[name].eps_255, done[name].correct) for name in sanity.LARGE] == [(16, 0), (64, 0)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda pixels: (pixels * 4).round() / 4, "the gradient is zero for 16 of 16 images"),
        (Nowhere.apply, "of 16 images over random noise"),
    ],
)
def test_hidden_gradients_are_found(mini, sets, quick, change, expected):
    check = sanity.check_attack(masked(mini, change), sets, ATTACK)
    assert any(expected in problem for problem in check.problems), check.problems
    assert any("still recognised at epsilon 16/255, and" in problem for problem in check.problems)


def test_gradients_hidden_from_half_of_the_images_are_found(mini, sets, quick):
    half = lambda pixels: torch.where(
        (torch.arange(len(pixels)) % 2 == 0)[:, None, None, None], pixels, (pixels * 4).round() / 4
    )
    check = sanity.check_attack(masked(mini, half), sets, ATTACK)
    assert "the gradient is zero for 8 of 16 images" in check.problems


@pytest.mark.parametrize("attack", ["pgd", "cw"])
def test_an_attack_that_hardly_attacks_is_not_counted(mini, sets, quick, tmp_path, capsys, attack):
    weak = ATTACK.model_copy(update={"attack": attack, "test_stepsize": 0.001})
    records = Bench.checking(RecordStore(tmp_path), weak, sets, 16).measure(mini, sets, weak, method="CLIP")
    assert [r.attack for r in records] == ["none", "none"]
    assert "the attack itself hardly raises the loss over random noise" in capsys.readouterr().out
    assert sanity.check_attack(mini, sets, ATTACK.model_copy(update={"attack": attack})).problems == []


def test_what_is_not_a_number_is_reported_and_nothing_breaks(mini, sets, quick, tmp_path, capsys):
    broken = masked(mini, lambda pixels: pixels * float("nan"))
    records = Bench.checking(RecordStore(tmp_path), ATTACK, sets, 16).measure(broken, sets, ATTACK, method="Broken")
    assert [r.attack for r in records] == ["none", "none"]
    (check,) = RecordStore(tmp_path).checks.all()
    assert check.zero_gradients == 16 and check.outcomes[1].loss is None
    assert [r.correct for r in records] == [0, 0]  # argmax would say class 0, and be right at times
    assert "logits are not finite for 8 of 8 images of shapes, which count as not recognised" in capsys.readouterr().out


def test_odd_sets(mini, quick, tmp_path):
    """A single class cannot be attacked; of two classes with one prompt none ever leads."""
    shapes = load_dataset("shapes", "test", n=8)
    single = replace(shapes, labels=torch.zeros(8, dtype=torch.long), prompts=shapes.prompts[:1])
    twins = replace(shapes, labels=torch.arange(8) % 2, prompts=shapes.prompts[:1] * 2)
    assert Bench.checking(RecordStore(tmp_path), ATTACK, [single], 8).checked_on == [] and [
        s.key for s in sanity.sets_to_check([single, shapes], 8)
    ] == ["shapes"]
    assert sanity.check_attack(mini, [twins], ATTACK).n == 8


def outcomes(**shares):
    """Per image, of 40: recognised by the first ones, with a loss that tells."""
    usual = {
        "clean": 40,
        "noise": 40,
        "PGD-1": 30,
        "PGD-10": 20,
        "PGD-100": 19,
        "Square": 35,
        sanity.LARGE[0]: 0,
        sanity.LARGE[1]: 0,
    } | shares
    order = list(usual)
    right = pd.DataFrame({name: np.arange(40) < usual[name] for name in order})
    noise = np.random.default_rng(0).normal(0, 0.1, (40, len(order)))
    return right, pd.DataFrame(noise, columns=order) + [0.1, 0.2, 1, 2, 2.1, 0.4, 9, 20]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, []),
        ({"PGD-100": 22, "Square": 18}, []),  # chance
        ({"PGD-100": 34}, ["PGD-10 fools 14 of 40 images that PGD-100 does not, and PGD-100 0 that PGD-10 does not"]),
        ({"Square": 4}, ["Square fools 15 of 40 images that PGD-100 does not, and PGD-100 0 that Square does not"]),
        (dict.fromkeys(sanity.LARGE, 12), ["12 of 40 images are still recognised at epsilon 16/255, and 12 at 64/255"]),
        ({sanity.LARGE[0]: 20}, []),  # as a model may that was tuned at a large epsilon
    ],
)
def test_what_is_beyond_chance_is_named(shares, expected):
    assert list(sanity.problems(*outcomes(**shares), 0, (16.0, 64.0))) == expected


@pytest.mark.parametrize("images", [2, 8, 16])
def test_a_few_images_that_do_as_most_do_raise_no_alarm(images):
    right, loss = (part[: 3 * images : 3] for part in outcomes())
    assert list(sanity.problems(right, loss, 0, (16.0, 64.0))) == []
    loss.iloc[0, loss.columns.get_loc("PGD-100")] = 0.0  # one of them goes another way
    assert list(sanity.problems(right, loss, 1, (16.0, 64.0))) == []


def test_a_loss_that_falls_with_steps_is_named():
    right, loss = outcomes()
    loss["PGD-100"] = loss["PGD-10"] - 1
    assert [p.split(" (")[0] for p in sanity.problems(right, loss, 0, (16.0, 64.0))] == [
        "PGD-100 reaches a lower loss than PGD-10"
    ]


def test_what_a_check_depends_on(mini, sets):
    key = lambda **changes: sanity.check_key(mini, sets, ATTACK.model_copy(update=changes))
    assert (
        len({key(), key(test_eps=1.0), key(norm="l2"), key(test_stepsize=2.0), key(test_numsteps=50), key(attack="cw")})
        == 6
    )
    large = [
        sanity.large_eps(AttackSettings(norm=norm, test_eps=eps, test_stepsize=1, test_numsteps=1))
        for norm, eps in (("linf", 1), ("linf", 12), ("l2", 128))
    ]
    assert large == [(16, 64), (24, 64), (2048, 8192)]


def test_images_are_taken_evenly():
    sets = [load_dataset(key, "test", n=20) for key in ("shapes", "letters", "colours", "sizes")]
    taken = lambda n: [(data.key, len(data)) for data in sanity.sets_to_check(sets, n)]
    assert taken(2) == [("shapes", 2)] and taken(16) == [("shapes", 8), ("colours", 8)]
    assert taken(48) == [(data.key, 12) for data in sets] and taken(999) == [(data.key, 20) for data in sets]
    assert taken(24) == [("shapes", 8), ("letters", 8), ("colours", 8)]


@pytest.fixture(scope="module")
def counted(mini, sets, tmp_path_factory):
    """Records of a sound model and of one that hides its gradients, with the store and what was printed."""
    patch = pytest.MonkeyPatch()
    for name, value in {"STEPS": (1, 3), "LARGE_STEPS": 8, "QUERIES": 5}.items():
        patch.setattr(sanity, name, value)
    store = RecordStore(tmp_path_factory.mktemp("records"))
    models = {"CLIP": mini, "Hidden": masked(mini, lambda pixels: (pixels * 4).round() / 4)}
    bench = Bench.checking(store, ATTACK, sets, 16)
    run = lambda: [r for name, clip in models.items() for r in bench.measure(clip, sets, ATTACK, method=name)]
    yield run, run(), bench
    patch.undo()


def test_what_cannot_be_trusted_is_said_and_not_counted(counted, capsys, monkeypatch):
    run, records, bench = counted
    store = bench.store
    assert [(r.method, r.attack) for r in records] == [("CLIP", "none"), ("CLIP", "pgd-3")] * 2 + [
        ("Hidden", "none")
    ] * 2
    assert (
        len(list(store.folder.glob("*.json"))) == 8 and len(store.checks.all()) == 2
    )  # measured and kept all the same
    monkeypatch.setattr("tgazsr_utils.measuring.bench.check_attack", None)  # nothing is checked again
    assert run() == records
    said = capsys.readouterr().out
    assert (
        said.count("\n") == 1
        and "robust accuracy of Hidden (seed 0) is not counted" in said
        and "gradient is zero" in said
    )
    verdicts = sanity.table(bench.checks).verdict
    assert verdicts["CLIP", 0] == "passed" and "gradient is zero" in verdicts["Hidden", 0]
    assert sanity.table({}).empty


def test_tables_and_figures_leave_a_gap_for_it(counted, tmp_path):
    records = counted[1]
    table = leaderboard(records)
    assert (
        list(table.index) == ["CLIP", "Hidden"]
        and table.loc["Hidden", ["robust", "average"]].isna().all()
        and table.loc["Hidden", "clean"] > 50
    )
    assert readable(table).loc["Hidden", "robust"] == "not counted"
    pairs = differences(records).set_index(["kind", "method", "other"]).difference
    assert np.isnan(pairs["robust", "CLIP", "Hidden"]) and not np.isnan(pairs["clean", "CLIP", "Hidden"])
    for part in (records, [r for r in records if r.method == "Hidden"]):  # some, and all of them
        frame = results.to_frame(part)
        figures = [
            plots.accuracy_heatmap(frame, "a"),
            plots.trade_off(leaderboard(part), "a"),
            plots.difference_matrix(differences(part), "a"),
        ]
        for number, figure in enumerate([*figures, plots.accuracy_bars(frame[frame.dataset == "shapes"], "a")]):
            style.save(figure, tmp_path, str(number))


def test_a_gap_in_the_grid_of_alpha_and_beta_keeps_its_place():
    values = {"robust": [1.0, np.nan, 3.0, np.nan], "clean": [1.0, 2, 3, 4], "average": [1.0, np.nan, 3.0, np.nan]}
    values |= {f"{kind}_ci": 4 * [1.0] for kind in values}
    table = pd.DataFrame(
        values, index=pd.MultiIndex.from_tuples([(0, 0), (0, 0.05), (0.08, 0), (0.08, 0.05)], names=["Alpha", "Beta"])
    )
    figure = sweeps.alpha_beta(table, "a")
    assert [len(axis.get_xticklabels()) for axis in figure.axes[:3]] == [2, 2, 2]
    svg = sweep_svg(table.reset_index(), 0.08, 0.05)
    assert ">–</text>" in svg and "nan" not in svg


def test_of_three_seeds_one_that_fails_makes_a_gap(counted):
    sound = [r for r in counted[1] if r.method == "CLIP"]
    seeds = [
        r.model_copy(update={"seed": s, "method": "Mine"}) for s in (0, 1, 2) for r in sound if s or r.attack == "none"
    ]
    table = leaderboard([*sound, *seeds])
    assert (
        np.isnan(table.loc["Mine", "robust"])
        and np.isnan(table.loc["Mine", "robust_ci"])
        and table.loc["Mine", "interval"] == "3 seeds"
    )
    assert differences([*sound, *seeds]).query("kind == 'robust' and method != other").difference.isna().all()


def test_nothing_is_checked_of_random_weights_or_without_a_budget(mini, sets, tmp_path, monkeypatch):
    monkeypatch.setattr("tgazsr_utils.measuring.bench.check_attack", None)
    plumbing = [load_dataset("shapes", "test", n=4, world=PLUMBING)]
    nothing = ATTACK.model_copy(update={"test_eps": 0.0})
    for attack, parts, images in ((ATTACK, plumbing, 8), (nothing, sets, 8), (ATTACK, sets, 0)):
        bench = Bench.checking(RecordStore(tmp_path), attack, parts, images)
        assert len(bench.measure(mini, sets[:1], ATTACK, method="CLIP")) == 2 and not bench.checks


def test_several_processes_check_once_and_say_so_once(mini, sets, tmp_path, quick, capfd):
    store = RecordStore(tmp_path)
    bench = Bench.checking(store, ATTACK, sets[:1], 8, number_of_processes=2)
    models = {"CLIP": mini, "Hidden": masked(mini, lambda pixels: (pixels * 4).round() / 4)}
    records = [r for name, clip in models.items() for r in bench.measure(clip, sets[:1], ATTACK, method=name)]
    assert [(r.method, r.attack) for r in records] == [("CLIP", "none"), ("CLIP", "pgd-3"), ("Hidden", "none")]
    assert len(store.checks.all()) == len(bench.checks) == 2 and capfd.readouterr().out.count("is not counted") == 1
