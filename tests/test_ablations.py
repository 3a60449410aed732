import numpy as np
import pandas as pd
import pytest
from conftest import size

from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring import ablations
from tgazsr_utils.measuring.ablations import ABLATIONS, Sweep, base_training, by_seed, plan, question, table
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import RecordStore
from tgazsr_utils.parameters import AblationNotebook, SettingsError, validate
from tgazsr_utils.profiles import default_parameters, load_profile, parameters_of
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import find_weights


def settings(**changes):
    return validate(AblationNotebook, default_parameters("03_ablations") | changes)


@pytest.fixture
def sweep(mini, tmp_path):
    """Eight steps of training and two sets of a few images."""
    train = load_dataset("shapes", "train", n=32)
    sizes = size((8, 4), (12, 6))
    tests, few = ([load_dataset(key, "test", n=n) for key in ("shapes", "colours")] for n in sizes)
    return Sweep(mini, train, tests, few, tmp_path / "models", Bench(RecordStore(tmp_path / "records")))


QUICK = {"train_images": 32, "batch_size": 8, "warmup_steps": 1, "test_numsteps": 2, "test_numsteps_list": [2, 4]}


def test_every_ablation_has_a_name_a_question_and_a_cut():
    everything, cut = plan(settings(ablations="all")), plan(settings())
    for name in ABLATIONS:
        assert "?" in question(name)
        labels = lambda variants: [tuple(v.label.items()) for v in variants]
        assert len(set(labels(everything[name]))) == len(everything[name])
        if name == "learning_rate":  # a grid, or nothing
            assert name not in cut
            continue
        assert 2 <= len(cut[name]) <= len(everything[name])
        assert set(labels(cut[name])) <= set(labels(everything[name]))
        assert cut[name][0].label == everything[name][0].label
    assert sum(map(len, cut.values())) < 0.7 * sum(map(len, everything.values()))


def test_subsets_are_chosen_by_name():
    assert list(plan(settings(ablations="seeds"))) == ["seeds"]
    chosen = plan(settings(ablations=["alpha_beta", "loss_parts"], Alpha_list=[0.0, 0.5], Beta_list=[0.1]))
    assert list(chosen) == ["alpha_beta", "loss_parts"]
    pairs = {tuple(v.label.values()) for v in chosen["alpha_beta"]}
    assert pairs == {(a, b) for a in (0.0, 0.08, 0.5) for b in (0.05, 0.1)}  # the base is always among them
    for bad in ("loss_part", ["seeds", "nothing"]):
        with pytest.raises(
            SettingsError, match="parameter ablations = .*is unknown; choose 'cut', 'all', or of loss_parts, distance"
        ):
            settings(ablations=bad)


@pytest.mark.parametrize("profile", ["mini", "smoke", "mini-reference", "full", "photo", "quick"])
def test_every_profile_has_what_each_ablation_compares(profile, tmp_path):
    values = load_profile(profile)
    of_files = {"data_root", "preprocess", "test_fraction", "on_bad_image"}
    values = values.model_copy(update={"parameters": {k: v for k, v in values.parameters.items() if k not in of_files}})
    s = validate(AblationNotebook, parameters_of("03_ablations", values, "runs/x", {"attack": "cw"}))
    for choice in ("cut", "all"):
        base = plan(s.model_copy(update={"ablations": choice}))["epsilon"][0]
        assert (base.training, base.attack) == (base_training(s), s.only(AttackSettings))


def test_one_thing_varies_in_each_ablation():
    s = settings(ablations="all", overrides={"FARE": {"lr": 1.0}})
    base = base_training(s)
    assert (base.Alpha, base.Beta) == (0.08, 0.05)
    for name in ("loss_parts", "distance", "attention", "alpha_beta", "tuned_part"):
        for v in plan(s)[name]:
            changed = {k for k, value in v.training.model_dump().items() if value != getattr(base, k)}
            assert len(changed) + (v.method != "TGA-ZSR") <= (2 if name == "alpha_beta" else 1), v
            assert v.attack.test_eps == s.test_eps and not v.few_images
    for v in plan(s)["epsilon"]:
        attack = v.attack
        assert attack.test_stepsize / attack.test_eps == pytest.approx(s.test_stepsize / s.test_eps)
        if v.training is not None:
            assert v.training.train_stepsize == v.training.train_eps  # as in the base
    by_method = {
        v.method: v
        for v in plan(settings(ablations="seeds", methods=["FARE", "PMG-AFT"], overrides={"FARE": {"lr": 1.0}}))[
            "seeds"
        ]
    }
    assert by_method["FARE"].training.lr == 1.0 and by_method["FARE"].seeds == (0, 1, 2)


def test_what_another_notebook_trained_is_shared_and_stays_the_latest(sweep, tmp_path):
    """04 trains a method with its own settings; the ablations find that file, and leave it what "latest:" means."""
    s = settings(**QUICK)
    trained = {
        m: finetune(sweep.original, sweep.train, m, s.finetuning(m), tmp_path / "models") for m in ("TeCoA", "TGA-ZSR")
    }
    run = Run(tmp_path / "run")
    shown = [run.show(result.weights) for result in trained.values()]
    for name, method in (
        ("loss_parts", "TeCoA"),
        ("attention", "TeCoA"),
        ("alpha_beta", "TeCoA"),
        ("seeds", "TGA-ZSR"),
    ):
        v = next(v for v in plan(s)[name] if v.method == method)
        sweep._tuned(v, 0)
        assert trained[method].weights in sweep._loaded
    sweep.run("tuned_part", plan(s)["tuned_part"])
    assert len(list((tmp_path / "models").glob("TGA-ZSR_*.safetensors"))) == 2
    assert find_weights("latest:TGA-ZSR", run.models) == str(shown[1])


def test_a_learning_rate_too_high_is_left_out(sweep, monkeypatch, capsys):
    """Of FARE, whose loss has no bound; elsewhere such a training ends the notebook."""
    s = settings(**QUICK, ablations=["learning_rate", "seeds"], methods=["FARE"], lr=1e-4, lr_list=[1e-4, 1e3])
    s = s.model_copy(update={"overrides": {}, "warmup_steps": 0})
    done = sweep.run("learning_rate", plan(s)["learning_rate"])
    assert [v.training.lr for v, _ in done] == [1e-4]
    assert "left out: gradient of FARE is not finite at step 1" in capsys.readouterr().out
    assert ablations.best_rates(table("learning_rate", done)) == {"FARE": {"lr": 1e-4}}
    with pytest.raises(FloatingPointError):
        sweep.run("seeds", [v for v in plan(s)["learning_rate"] if v.training.lr == 1e3])


def test_the_best_rate_is_the_lowest_of_those_with_the_best_average():
    rows = [("A", 1e-3, 50.0), ("A", 1e-4, 60.0), ("A", 1e-2, 60.0), ("B", 1e-3, 10.0)]
    frame = pd.DataFrame(rows, columns=["method", "lr", "average"]).set_index(["method", "lr"])
    assert ablations.best_rates(frame) == {"A": {"lr": 1e-4}, "B": {"lr": 1e-3}}


def test_a_sweep_resumes_and_does_nothing_twice(sweep, monkeypatch):
    s = settings(**QUICK, ablations=["loss_parts", "seeds"], methods=["TeCoA", "TGA-ZSR"])
    done = {name: sweep.run(name, variants) for name, variants in plan(s).items()}
    # CE, both (seeds 0, 1, 2 each) and one for each of the two terms
    assert len(list(sweep.models.glob("*.safetensors"))) == 8
    assert len(sweep.bench.store.all()) == 8 * 2 * 2  # 8 models and 2 sets, clean and attacked
    monkeypatch.setattr(
        ablations, "finetune", lambda *a, **k: finetune(*a, **k, stop=lambda: pytest.fail("trained again"))
    )
    again = {name: sweep.run(name, variants) for name, variants in plan(s).items()}
    for name in done:
        pd.testing.assert_frame_equal(table(name, done[name]), table(name, again[name]))

    shown = table("loss_parts", done["loss_parts"])
    assert list(shown.index) == ["CE", "CE + L_AR", "CE + L_AMC", "CE + L_AR + L_AMC"]
    assert set(shown.interval) == {"images"} and np.isnan(shown.robust_minus_first.iloc[0])
    np.testing.assert_allclose(shown.robust_minus_first.iloc[1:], shown.robust.iloc[1:] - shown.robust.iloc[0])
    several = table("seeds", done["seeds"])
    assert set(several.interval) == {"3 seeds"} and len(by_seed(done["seeds"])) == 6
    assert several.robust.iloc[0] == pytest.approx(by_seed(done["seeds"]).query("method == 'TeCoA'").robust.mean())


def test_the_untuned_model_is_compared_with_each_seed(sweep):
    s = settings(
        **QUICK, ablations="epsilon", train_eps_list=[3.5], test_eps_list=[3.5], train_numsteps_list=[2], seeds=[0, 1]
    )
    done = sweep.run("epsilon", plan(s)["epsilon"])
    shown = table("epsilon", done)
    untuned = shown.index.get_level_values("train_eps") == "CLIP"
    assert (shown.interval[untuned] == "images").all()
    first = shown[~untuned].iloc[0]
    assert shown[untuned].robust_minus_first.item() == pytest.approx(shown[untuned].robust.item() - first.robust)
    assert (shown.interval[~untuned] == "2 seeds").all()
