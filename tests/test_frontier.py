"""The methods of ``core.frontier``, each against its formula written out slowly in float64."""

import json
from dataclasses import replace

import numpy as np
import pytest
import slow_reference as slow
import torch
from conftest import train_settings
from test_objectives import SETTINGS, as_arrays, parts, values

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.frontier import interpolated
from tgazsr_utils.core.objectives import OBJECTIVES, PRESET, Step, find_objective
from tgazsr_utils.core.training import attacked, warmed_up
from tgazsr_utils.datasets.descriptions import read_descriptions
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.parameters import EvaluateNotebook, validate
from tgazsr_utils.profiles import check_prompts, default_parameters
from tgazsr_utils.runtime.finetuning import finetune, tuned_path
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.workbook import open_workbook

NEW = "Sim-CLIP", "UCAT", "AGFT", "SAFT", "AdvFLYP"


def unit(pooled):
    return pooled / np.sqrt((pooled**2).sum(1, keepdims=True))


def climbs(step, name):
    """PGD on what the method's attack maximises raises it more than noise of the same size does."""
    loss = OBJECTIVES[name].attack(step)
    found = pgd(step.clip, step.images, step.labels, step.text, 0.02, 0.01, 3, loss=loss)
    noise = (step.images + 0.02 * torch.randn_like(step.images).sign()).clamp(0, 1)
    return loss(step.clip.encode_image(found)) > loss(step.clip.encode_image(noise))


def test_published_settings():
    preset = {name: OBJECTIVES[name].preset for name in NEW}
    assert preset["SAFT"] == preset["Sim-CLIP"] == PRESET
    assert preset["UCAT"] == preset["AdvFLYP"] == PRESET | {"batch_size": 256}
    assert preset["AGFT"] == PRESET | {"batch_size": 256, "lr": 4e-4}


def test_sim_clip_is_the_cosine_to_the_original_embedding(step):
    attacked, _, _, original, *_ = parts(step)
    assert values(step, "Sim-CLIP") == pytest.approx({"L_sim": -(unit(attacked) * unit(original)).sum(1).mean()})
    assert OBJECTIVES["Sim-CLIP"].attack is OBJECTIVES["FARE"].attack


def test_ucat_is_cross_entropy_and_the_divergence_of_two_dirichlet_distributions(step):
    attacked, _, _, original, text, labels, scale = parts(step)
    evidence = lambda pooled: 1e-6 + np.exp((unit(pooled) @ text.T + 1) / 0.07)
    divergence = np.mean([slow.dirichlet_divergence(*pair) for pair in zip(evidence(attacked), evidence(original))])
    expected = {"CE": slow.cross_entropy(attacked, text, labels, scale), "L_Dir": divergence}
    assert values(step, "UCAT") == pytest.approx(expected, rel=1e-4)
    weights = {term.name: term.weight for term in OBJECTIVES["UCAT"].terms(step, SETTINGS)}
    assert weights == {"CE": 1.0, "L_Dir": pytest.approx(3.905e-8, rel=1e-3)}


def test_agft_is_cross_entropy_to_the_originals_answers_and_attacks_it(step):
    attacked, _, _, original, text, labels, _ = parts(step)
    p = np.exp(slow.log_softmax(original, text, 72.0))
    expected = -(p * slow.log_softmax(attacked, text, 180.0)).sum(1)
    assert values(step, "AGFT") == pytest.approx({"L_soft": expected.mean()}, rel=1e-4)
    assert OBJECTIVES["AGFT"].attack(step)(step.adversarial_tokens).item() == pytest.approx(expected.sum(), rel=1e-4)
    assert climbs(step, "AGFT")


@pytest.mark.parametrize("variant", ["reference", "cosine"])
def test_saft_is_tga_zsr_with_means_over_descriptions(step, shapes, variant):
    step.descriptions = shapes.descriptions
    labels, scale = step.labels.numpy(), parts(step)[-1]
    described = [step.original.encode_text(texts).double().numpy() for texts in shapes.descriptions]  # [n,D] a class
    adversarial, clean, original = (
        as_arrays(clip.encode_image(x))
        for clip, x in ((step.clip, step.adversarial), (step.clip, step.images), (step.original, step.images))
    )
    each = [slow.cross_entropy(adversarial[0], np.array(texts), labels, scale) for texts in zip(*described)]

    def attention(pooled, patches, texts):  # before min-max: scores that are linear in the text's length
        scores = np.mean([_scores(pooled, patches, text, variant) for text in texts], axis=0)
        return ((scores - scores.min()) / (scores.max() - scores.min())).reshape(7, 7)

    maps = [[attention(p, q, described[y]) for p, q, y in zip(*s, labels)] for s in (adversarial, clean, original)]
    mean = lambda a: np.mean([slow.distance(m, t, "l2", SETTINGS.distance_size) for m, t in zip(a, maps[2])])
    expected = {"CE": np.mean(each), "L_AR": mean(maps[0]), "L_AMC": mean(maps[1])}
    settings = SETTINGS.model_copy(update={"attention_variant": variant})
    assert values(step, "SAFT", settings) == pytest.approx(expected, rel=1e-3)
    assert OBJECTIVES["SAFT"].attack(step)(step.adversarial_tokens).item() == pytest.approx(6 * np.mean(each), rel=1e-4)
    assert climbs(step, "SAFT")


def _scores(pooled, patches, text, variant):
    tokens = np.concatenate([pooled[None], patches])
    norms = np.sqrt((tokens**2).sum(0 if variant == "reference" else 1, keepdims=True))
    return (tokens / norms)[1:] @ text


@pytest.mark.parametrize("captions", [True, False])
def test_advflyp_is_contrastive_and_keeps_near_the_original_and_the_clean_image(step, shapes, captions):
    step.captions = shapes.captions[:6] if captions else None
    attacked, clean, original_attacked, *_, labels, scale = parts(step)
    texts = step.captions or [step.prompts[y] for y in labels]
    text = step.original.encode_text(texts).double().numpy()
    logs = [slow.log_softmax(pooled, text, scale) for pooled in (attacked, original_attacked, clean)]
    away = lambda other: np.sqrt(((unit(attacked) - unit(other)) ** 2).sum(1)).mean()
    expected = {
        "L_con": slow.contrastive(attacked, text, scale),
        "L_original": away(original_attacked),
        "L_clean": away(clean),
        "KL_original": slow.divergence(logs[0], logs[1]) / 6,
        "KL_clean": slow.divergence(logs[0], logs[2]) / 6,
    }
    assert values(step, "AdvFLYP") == pytest.approx(expected, rel=1e-3)
    loss = OBJECTIVES["AdvFLYP"].attack(step)(step.adversarial_tokens)
    assert loss.item() == pytest.approx(6 * expected["L_con"], rel=1e-4) and climbs(step, "AdvFLYP")


def test_advflyp_has_no_gradient_of_a_rounding(mini, shapes):
    """While f is f0 the same attacked image has no distance under both; nor has an image that is not attacked."""
    tuned = mini.frozen_copy()
    tuned.visual.requires_grad_(True)
    step = Step.of(shapes, next(shapes.batches(6)), tuned, mini)
    step.adversarial = step.images
    terms = {term.name: term.value for term in OBJECTIVES["AdvFLYP"].terms(step, SETTINGS)}
    for name in ("L_original", "L_clean"):
        slopes = torch.autograd.grad(terms[name], list(tuned.visual.parameters()), retain_graph=True)
        assert terms[name].item() == 0 and not any(slope.any() for slope in slopes)


@pytest.mark.parametrize("method", NEW)
def test_each_trains(mini, tmp_path, method):
    data = load_dataset("shapes", "train", n=16)
    result = finetune(mini, data, method, train_settings(Alpha=None, Beta=None), tmp_path)
    assert len(result.history) == 2 and np.isfinite(result.history.to_numpy(float)).all()
    assert (result.history.gradient_norm > 0).all() and fingerprint(result.clip) != fingerprint(mini)


def test_weights_are_named_by_the_texts_that_a_method_reads(mini, tmp_path):
    data = load_dataset("shapes", "train", n=16)
    others = {"captions": data.captions[::-1], "descriptions": tuple(texts[:3] for texts in data.descriptions)}
    for method, reads in (("SAFT", {"descriptions"}), ("AdvFLYP", {"captions"}), ("UCAT", set())):
        named = lambda of, method=method: tuned_path(tmp_path, find_objective(method), train_settings(), of, mini)
        changed = {name for name, texts in others.items() if named(replace(data, **{name: texts})) != named(data)}
        assert changed == reads


def test_descriptions_come_from_a_file(tmp_path, capsys):
    path = tmp_path / "texts.json"
    given = {"Circle": ["round", "a disc", "a coin"], "two_words": ["x", "y"], "other": 5, "bar": "a beam"}
    path.write_text(json.dumps(given), encoding="utf-8")
    assert read_descriptions(str(path), ["two words", "circle"]) == (("x", "y"), ("round", "a disc"))
    assert capsys.readouterr().err == "descriptions: the first 2 of each class, as 'two words' has no more\n"
    assert read_descriptions(str(path), ["bar", "circle"]) == (("a beam",), ("round",))
    for name in ("star", "other"):
        with pytest.raises(ValueError, match=f"texts.json' has no texts for class '{name}'; it should be a list"):
            read_descriptions(str(path), ["circle", name])
    for content in ("[1, 2]", "{", '{"circle": ' + "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match="texts.json' (should be an object|cannot be read as JSON)"):
            read_descriptions(str(path), ["circle"])


def test_missing_descriptions_are_told_before_anything_runs(photo_root, tmp_path, mini, shapes):
    values = default_parameters("04_evaluate_16_datasets") | {"methods": ["SAFT"], "dataset": "animals"}
    settings = lambda **more: validate(EvaluateNotebook, values | {"data_root": str(photo_root)} | more)
    with pytest.raises(ValueError, match="animals has no descriptions of its classes: -p descriptions FILE"):
        check_prompts(settings())
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"red fox": ["it is red"], "green-x": ["green " * 40]}))
    with pytest.raises(ValueError, match="prompt 'green green .* is longer than the 32 tokens"):
        check_prompts(settings(descriptions=str(path)))
    path.write_text(json.dumps({"red fox": ["it is red"], "green-x": ["it is green"]}))
    check_prompts(settings(descriptions=str(path)))
    book = open_workbook("04_evaluate_16_datasets", settings(descriptions=str(path), output=str(tmp_path)).model_dump())
    assert dict(zip(book.train.class_names, book.train.descriptions))["red fox"] == ("it is red",)
    step = Step(mini, mini, shapes.images[:2], shapes.labels[:2], shapes.prompts)
    with pytest.raises(ValueError, match="this set has no descriptions of its classes"):
        OBJECTIVES["SAFT"].attack(step)


def test_interpolation_is_between_the_weights(mini):
    tuned = mini.frozen_copy()
    with torch.no_grad():
        for parameter in tuned.visual.parameters():
            parameter += 0.1
    tuned.training_record = {"method": "X"}
    between = interpolated(mini, tuned, 0.3)
    models = between, mini, tuned, interpolated(mini, tuned, 0.0), interpolated(mini, tuned, 1.0)
    for found, a, b, first, last in zip(*(clip.visual.parameters() for clip in models)):
        assert torch.equal(first, a) and torch.equal(last, b)
        torch.testing.assert_close(found.double(), 0.7 * a.double() + 0.3 * b.double(), rtol=1e-6, atol=1e-6)
    assert between.training_record == {"method": "X", "interpolated": 0.3} and tuned.training_record == {"method": "X"}


def test_interpolated_models_are_rows_of_their_own(tmp_path):
    given = {"train_images": 16, "batch_size": 8, "warmup_steps": 1, "check_images": 0, "test_images": 8}
    given |= {"test_numsteps": 1, "testdata": ["shapes"], "interpolate": [0.5], "output": str(tmp_path / "run")}
    book = open_workbook("04_evaluate_16_datasets", given)
    rows = list(book.tuned("TeCoA", 0))
    assert [name for name, _ in rows] == ["TeCoA", "TeCoA w=0.5"]
    clean, robust = book.measure(rows[1][1], rows[1][0], 0)
    assert (clean.method, robust.attack) == ("TeCoA w=0.5", "pgd-1") and clean.training["interpolated"] == 0.5


def test_epsilon_rises_and_is_held():
    settings = train_settings(train_eps=4, train_stepsize=2, attack_warmup=[0.25, 0.75])
    found = [warmed_up(settings, number, 8) for number in range(8)]
    assert [s.train_eps for s in found] == [0, 0, 0, 1, 2, 3, 4, 4]
    assert [s.train_stepsize for s in found] == [0, 0, 0, 0.5, 1, 1.5, 2, 2]
    at_once = train_settings(train_eps=4, attack_warmup=[0.5, 0.5])
    assert [warmed_up(at_once, number, 4).train_eps for number in range(4)] == [0, 0, 4, 4]
    assert warmed_up(train_settings(), 0, 8) is not None and train_settings().attack_warmup is None


def test_a_schedule_of_epsilon_is_trained(mini, shapes, tmp_path):
    step = Step.of(shapes, next(shapes.batches(4)), mini, mini)
    assert attacked(step, OBJECTIVES["TeCoA"], train_settings(train_eps=0), 0) is step.images
    data, whole = load_dataset("shapes", "train", n=16), train_settings(epochs=2)
    first = {}
    for name, warmup in (("none", None), ("all", [0, 0]), ("late", [0.5, 1])):
        settings = whole.model_copy(update={"attack_warmup": warmup})
        first[name] = finetune(mini, data, "TGA-ZSR", settings, tmp_path).history
    assert first["none"].loss.tolist() == first["all"].loss.tolist()
    assert first["late"].loss[0] < first["none"].loss[0] and first["late"].L_AR[0] == 0
