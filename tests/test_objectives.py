import numpy as np
import pytest
import slow_reference as slow
import torch

from tgazsr_utils.models import Clip, ImageTokens
from tgazsr_utils.objectives import OBJECTIVES, Step, objective
from tgazsr_utils.settings import ObjectiveSettings

SETTINGS = ObjectiveSettings(Alpha=0.08, Beta=0.05, Distance_metric="l2", attention_variant="reference", distance_size=12)


@pytest.fixture
def step(mini, shapes, generator):
    """A tuned model that differs from the original, and images that differ from the clean ones."""
    tuned = mini.frozen_copy()
    with torch.no_grad():
        for parameter in tuned.visual.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    tuned.visual.requires_grad_(True)
    images = shapes.images[:6].float() / 255
    adversarial = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return Step(tuned, mini, images, adversarial, shapes.labels[:6], mini.encode_text(shapes.prompts))


def as_arrays(tokens: ImageTokens):
    return [t.detach().double().numpy() for t in tokens]


def expected_terms(step, metric, variant):
    text, labels = step.text.double().numpy(), step.labels.numpy()
    adversarial, clean, original = (
        as_arrays(clip.encode_image(x))
        for clip, x in ((step.clip, step.adversarial), (step.clip, step.images), (step.original, step.images))
    )
    scale = min(100.0, float(step.clip.model.logit_scale.exp()))
    maps = [
        [slow.attention(p, q, text[y], variant).reshape(7, 7) for p, q, y in zip(*tokens, labels)]
        for tokens in (adversarial, clean, original)
    ]
    mean = lambda a: np.mean([slow.distance(m, t, metric, SETTINGS.distance_size) for m, t in zip(a, maps[2])])
    return slow.cross_entropy(adversarial[0], text, labels, scale), mean(maps[0]), mean(maps[1])


@pytest.mark.parametrize("metric", ["l2", "l1", "cos"])
@pytest.mark.parametrize("variant", ["reference", "cosine"])
def test_tga_zsr_equals_the_slow_formula(step, metric, variant):
    settings = SETTINGS.model_copy(update={"Distance_metric": metric, "attention_variant": variant})
    terms = OBJECTIVES["TGA-ZSR"].terms(step, settings)
    assert [(t.name, t.weight) for t in terms] == [("CE", 1.0), ("L_AR", 0.08), ("L_AMC", 0.05)]
    np.testing.assert_allclose([t.value.item() for t in terms], expected_terms(step, metric, variant), rtol=2e-4)


def test_tecoa_is_cross_entropy_on_attacked_images(step):
    (term,) = OBJECTIVES["TeCoA"].terms(step, SETTINGS)
    assert term.value.item() == pytest.approx(expected_terms(step, "l2", "reference")[0], rel=1e-5)


def test_published_learning_rates():
    assert (OBJECTIVES["TeCoA"].lr, OBJECTIVES["TGA-ZSR"].lr) == (1e-5, 1e-4)


def test_each_image_passes_the_encoder_once_and_the_original_without_a_graph(step, monkeypatch):
    calls = []
    encode = Clip.encode_image

    def counted(self, pixels):
        tokens = encode(self, pixels)
        calls.append((self is step.clip, pixels is step.adversarial, tokens.pooled.requires_grad))
        return tokens

    monkeypatch.setattr(Clip, "encode_image", counted)
    OBJECTIVES["TGA-ZSR"].terms(step, SETTINGS)
    assert sorted(calls) == [(False, False, False), (True, False, True), (True, True, True)]
    calls.clear()
    fresh = Step(step.clip, step.original, step.images, step.adversarial, step.labels, step.text)
    OBJECTIVES["TeCoA"].terms(fresh, SETTINGS)
    assert calls == [(True, True, True)]


def test_gradients_reach_the_tuned_weights_only(step):
    loss = sum(t.weight * t.value for t in OBJECTIVES["TGA-ZSR"].terms(step, SETTINGS))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step.clip.visual.parameters())
    assert all(p.grad is None for p in step.original.parameters())


def test_adding_a_method_is_adding_one_function(monkeypatch):
    monkeypatch.setattr("tgazsr_utils.objectives.OBJECTIVES", dict(OBJECTIVES))
    from tgazsr_utils import objectives

    @objective("Mine", lr=0.5)
    def mine(step, settings):
        return []

    assert objectives.OBJECTIVES["Mine"].lr == 0.5 and "Mine" not in OBJECTIVES
