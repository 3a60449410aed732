"""Checks of the attack: sound models pass, models that hide their gradients do not, and what they seem to withstand is not counted."""

import numpy as np
import pandas as pd
import pytest
import torch

from tgazsr_utils import plots, results, sanity
from tgazsr_utils.datasets import load_dataset
from tgazsr_utils.evaluation import Record
from tgazsr_utils.models import load_clip
from tgazsr_utils.results import RecordStore, attack_checks, differences, evaluate_all, leaderboard, readable
from tgazsr_utils.settings import PLUMBING, AttackSettings

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
        return gradient.flip(0, 2, 3).roll(7, 3) * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))


def masked(clip, change):
    copy = clip.frozen_copy()
    copy.visual.register_forward_pre_hook(lambda module, given: (change(given[0]),))
    next(copy.visual.parameters()).data += 1e-6  # another model to the store
    return copy


steps_of = lambda check: {outcome.attack: outcome for outcome in check.outcomes}


@pytest.mark.parametrize("weights", ["mini", "mini-tga-zsr"])
def test_a_sound_model_passes(weights, sets):
    check = sanity.check_attack(load_clip("mini-clip", weights, "cpu"), sets, ATTACK)
    assert check.problems == [] and check.zero_gradients == 0 and check.n == 16
    done = steps_of(check)
    assert list(done) == ["clean", "noise", "PGD-1", "PGD-10", "PGD-100", "Square", sanity.LARGE]
    assert done["noise"].loss < done["PGD-1"].loss < done["PGD-10"].loss < done["PGD-100"].loss < done[sanity.LARGE].loss
    assert done["PGD-100"].correct < done["Square"].correct <= done["clean"].correct
    assert done[sanity.LARGE].eps_255 == 16 and done[sanity.LARGE].correct == 0


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
    assert any("still recognised at epsilon 16/255" in problem for problem in check.problems)


def outcomes(**shares):
    """Per image, of 40: recognised by the first ones, with a loss that tells."""
    order = ["clean", "noise", "PGD-1", "PGD-10", "PGD-100", "Square", sanity.LARGE]
    usual = {"clean": 40, "noise": 40, "PGD-1": 30, "PGD-10": 20, "PGD-100": 19, "Square": 35, sanity.LARGE: 0} | shares
    right = pd.DataFrame({name: np.arange(40) < usual[name] for name in order})
    noise = np.random.default_rng(0).normal(0, 0.1, (40, len(order)))
    return right, pd.DataFrame(noise, columns=order) + [0.1, 0.2, 1, 2, 2.1, 0.4, 9]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({}, []),
        ({"PGD-100": 22, "Square": 18}, []),  # chance
        ({"PGD-100": 34}, ["PGD-10 fools 14 of 40 images that PGD-100 does not, and PGD-100 0 that PGD-10 does not"]),
        ({"Square": 4}, ["Square fools 15 of 40 images that PGD-100 does not, and PGD-100 0 that Square does not"]),
        ({sanity.LARGE: 12}, ["12 of 40 images are still recognised at epsilon 16/255"]),
        ({sanity.LARGE: 3}, []),
    ],
)
def test_what_is_beyond_chance_is_named(shares, expected):
    assert list(sanity.problems(*outcomes(**shares), 0, 16.0)) == expected


def test_a_loss_that_falls_with_steps_is_named():
    right, loss = outcomes()
    loss["PGD-100"] = loss["PGD-10"] - 1
    assert [p.split(" (")[0] for p in sanity.problems(right, loss, 0, 16.0)] == ["PGD-100 reaches a lower loss than PGD-10"]


def test_what_a_check_depends_on(mini, sets):
    key = lambda **changes: sanity.check_key(mini, sets, ATTACK.model_copy(update=changes))
    assert key() == key(test_numsteps=50) == key(attack="cw")
    assert len({key(), key(test_eps=1.0), key(norm="l2"), key(test_stepsize=2.0), key(attack="autoattack")}) == 5
    assert sanity.checked_settings(ATTACK.model_copy(update={"attack": "autoattack"}))["test_stepsize"] == 3.5 / 4
    large = [sanity.large_eps(AttackSettings(norm=norm, test_eps=eps, test_stepsize=1, test_numsteps=1)) for norm, eps in (("linf", 1), ("linf", 12), ("l2", 128))]
    assert large == [16, 24, 2048]


def test_images_are_taken_evenly():
    sets = [load_dataset(key, "test", n=20) for key in ("shapes", "letters", "colours", "sizes")]
    taken = lambda n: [(data.key, len(data)) for data in sanity.sets_to_check(sets, n)]
    assert taken(2) == [("shapes", 2)] and taken(16) == [("shapes", 8), ("colours", 8)]
    assert taken(48) == [(data.key, 12) for data in sets] and taken(999) == [(data.key, 20) for data in sets]


@pytest.fixture(scope="module")
def counted(mini, sets, tmp_path_factory):
    """Records of a sound model and of one that hides its gradients, with the store and what was printed."""
    patch = pytest.MonkeyPatch()
    for name, value in {"STEPS": (1, 3), "LARGE_STEPS": 8, "QUERIES": 5}.items():
        patch.setattr(sanity, name, value)
    store = RecordStore(tmp_path_factory.mktemp("records"))
    models = {"CLIP": mini, "Hidden": masked(mini, lambda pixels: (pixels * 4).round() / 4)}
    run = lambda: [r for name, clip in models.items() for r in evaluate_all(clip, sets, ATTACK, method=name, store=store, check_images=16)]
    yield run, run(), store
    patch.undo()


def test_what_cannot_be_trusted_is_said_and_not_counted(counted, capsys, monkeypatch):
    run, records, store = counted
    assert [(r.method, r.attack) for r in records] == [("CLIP", "none"), ("CLIP", "pgd-3")] * 2 + [("Hidden", "none")] * 2
    assert len(list(store.folder.glob("*.json"))) == 8 and len(store.checks.all()) == 2  # measured and kept all the same
    monkeypatch.setattr(results, "check_attack", None)  # nothing is checked again
    assert run() == records
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "robust accuracy of Hidden (seed 0) is not counted" in said and "gradient is zero" in said
    checks = attack_checks(records, ATTACK, store)
    verdicts = sanity.table(checks).verdict
    assert verdicts["CLIP"] == "passed" and "gradient is zero" in verdicts["Hidden"]
    assert attack_checks(records, ATTACK.model_copy(update={"test_eps": 1.0}), store) == {}


def test_tables_and_figures_leave_a_gap_for_it(counted):
    records = counted[1]
    table = leaderboard(records)
    assert list(table.index) == ["CLIP", "Hidden"] and table.loc["Hidden", ["robust", "average"]].isna().all() and table.loc["Hidden", "clean"] > 50
    assert readable(table).loc["Hidden", "robust"] == "not counted"
    pairs = differences(records).set_index(["kind", "method", "other"]).difference
    assert np.isnan(pairs["robust", "CLIP", "Hidden"]) and not np.isnan(pairs["clean", "CLIP", "Hidden"])
    frame = results.to_frame(records)
    plots.accuracy_heatmap(frame, "a")
    plots.trade_off(table, "a")
    plots.difference_matrix(differences(records), "a")
    plots.accuracy_bars(frame[frame.dataset == "shapes"], "a")


def test_of_three_seeds_one_that_fails_makes_a_gap(counted):
    sound = [r for r in counted[1] if r.method == "CLIP"]
    seeds = [r.model_copy(update={"seed": s, "method": "Mine"}) for s in (0, 1, 2) for r in sound if s or r.attack == "none"]
    table = leaderboard([*sound, *seeds])
    assert np.isnan(table.loc["Mine", "robust"]) and np.isnan(table.loc["Mine", "robust_ci"]) and table.loc["Mine", "interval"] == "3 seeds"
    assert differences([*sound, *seeds]).query("kind == 'robust' and method != other").difference.isna().all()


def test_nothing_is_checked_of_random_weights_or_without_a_budget(mini, sets, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "check_attack", None)
    plumbing = [load_dataset("shapes", "test", n=4, world=PLUMBING)]
    evaluate_all(mini, plumbing, ATTACK, method="CLIP", store=RecordStore(tmp_path), check_images=8)
    evaluate_all(mini, sets[:1], ATTACK.model_copy(update={"test_eps": 0.0}), method="CLIP", store=RecordStore(tmp_path), check_images=8)


def test_several_processes_check_once(mini, sets, tmp_path, quick):
    store = RecordStore(tmp_path)
    records = evaluate_all(mini, sets[:1], ATTACK, method="CLIP", store=store, check_images=8, processes=2)
    assert len(records) == 2 and all(isinstance(r, Record) for r in records) and len(store.checks.all()) == 1
