import numpy as np
import pytest
import slow_reference as slow
import torch

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.attention import grad_cam
from tgazsr_utils.core.models import Clip, ImageTokens
from tgazsr_utils.core.objectives import OBJECTIVES, PRESET, Step, negated, objective
from tgazsr_utils.core.settings import FinetuneSettings, ObjectiveSettings

SETTINGS = ObjectiveSettings(
    Alpha=0.08, Beta=0.05, Distance_metric="l2", attention_variant="reference", distance_size=12
)


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


def test_published_settings():
    """REFERENCE section 5: what is said there, and TGA-ZSR's own where nothing is."""
    preset = {name: objective.preset for name, objective in OBJECTIVES.items()}
    assert preset["TGA-ZSR"] == PRESET == preset["FT-Adv."] and preset["TeCoA"] == PRESET | {"lr": 1e-5}
    assert preset["PMG-AFT"] == preset["PMG-AFT-scaled"] == PRESET | {"lr": 5e-5, "batch_size": 256}
    robust_vlm = {"optimizer": "adamw", "lr": 1e-5, "weight_decay": 1e-4, "train_start": "uncut"}
    assert preset["FARE-RobustVLM"] == PRESET | robust_vlm | {"train_eps": 2.0, "train_numsteps": 10}
    assert preset["Comp-TGA"] == PRESET | {"Alpha": 0.10, "Beta": 0.07}
    given = {"epochs": 1, "batch_size": None, "lr": None, "warmup_steps": 1, "seed": 0}
    given |= {"train_eps": 3.0, "train_stepsize": None, "train_numsteps": None}
    settings = FinetuneSettings(Alpha=None, Beta=0.5, Distance_metric="l2", attention_variant="reference", **given)
    filled = OBJECTIVES["PMG-AFT"].with_preset(settings)
    assert (filled.lr, filled.batch_size, filled.train_numsteps, filled.Alpha) == (5e-5, 256, 2, 0.08)
    assert (filled.train_eps, filled.Beta) == (3.0, 0.5)  # what is given stays
    assert OBJECTIVES["FARE-RobustVLM"].with_preset(settings).weight_decay == 1e-4  # not given
    kept = settings.model_copy(update={"weight_decay": 0.0})
    assert OBJECTIVES["FARE-RobustVLM"].with_preset(kept).weight_decay == 0.0


def parts(step):
    """Pooled tokens as float64 arrays: f(x'), f(x), f0(x'), f0(x); text of the classes, labels, logit scale."""
    sides = [
        (step.clip, step.adversarial),
        (step.clip, step.images),
        (step.original, step.adversarial),
        (step.original, step.images),
    ]
    pooled = [as_arrays(clip.encode_image(x))[0] for clip, x in sides]
    scale = min(100.0, float(step.clip.model.logit_scale.exp()))
    return *pooled, step.text.double().numpy(), step.labels.numpy(), scale


def values(step, name, settings=SETTINGS):
    return {term.name: term.value.item() for term in OBJECTIVES[name].terms(step, settings)}


def test_the_contrastive_baselines(step):
    attacked, clean, _, _, text, labels, scale = parts(step)
    assert values(step, "FT-Clean")["L_con"] == pytest.approx(slow.contrastive(clean, text[labels], scale), rel=1e-4)
    assert values(step, "FT-Adv.")["L_con"] == pytest.approx(slow.contrastive(attacked, text[labels], scale), rel=1e-4)
    assert OBJECTIVES["FT-Clean"].attack is None


@pytest.mark.parametrize("name", ["PMG-AFT", "PMG-AFT-scaled"])
def test_pmg_aft_is_cross_entropy_and_two_divergences(step, name):
    """As released of bare cosines and summed over the batch; scaled with the temperature and averaged."""
    attacked, clean, original, _, text, labels, scale = parts(step)
    scale, images = (1.0, 1) if name == "PMG-AFT" else (scale, len(labels))
    logs = [slow.log_softmax(pooled, text, scale) for pooled in (attacked, clean, original)]
    assert values(step, name) == pytest.approx(
        {
            "CE": slow.cross_entropy(attacked, text, labels, scale),
            "L_general": slow.divergence(logs[2], logs[0]) / images,
            "L_clean": slow.divergence(logs[1], logs[0]) / images,
        },
        rel=1e-3,
    )
    terms = {t.name: t.value for t in OBJECTIVES[name].terms(step, SETTINGS)}
    (through_clean,) = torch.autograd.grad(terms["L_clean"], step.clean_tokens.pooled, retain_graph=True)
    assert through_clean.abs().max() > 0  # gradients flow through f(x) too


def test_fare_is_the_squared_distance_of_unnormalised_embeddings_and_attacks_it(step):
    attacked, _, _, original, *_ = parts(step)
    expected = np.mean([((a - b) ** 2).sum() for a, b in zip(attacked, original)])
    assert values(step, "FARE") == pytest.approx({"L_emb": expected}, rel=1e-4)
    loss = OBJECTIVES["FARE"].attack(step)
    assert loss(step.adversarial_tokens).item() == pytest.approx(6 * expected, rel=1e-4)
    found = pgd(step.clip, step.images, step.labels, step.text, 0.02, 0.01, 3, loss=loss)
    noise = (step.images + 0.02 * torch.randn_like(step.images).sign()).clamp(0, 1)
    assert loss(step.clip.encode_image(found)) > loss(step.clip.encode_image(noise))


@pytest.mark.parametrize("variant", ["reference", "cosine"])
def test_comp_tga_takes_away_what_the_negated_prompt_finds(step, variant):
    text, labels = step.text.double().numpy(), step.labels.numpy()
    prompts = [prompt.replace("This is a", "This is not a") for prompt in step.prompts]
    against = step.original.encode_text(prompts).double().numpy()
    size = 20
    resized = lambda p, q, t: slow.bilinear(slow.attention(p, q, t, variant).reshape(7, 7), size)
    maps = [
        [
            resized(p, q, text[y]) * (1 - resized(p, q, against[y]))
            for p, q, y in zip(*as_arrays(clip.encode_image(x)), labels)
        ]
        for clip, x in ((step.clip, step.adversarial), (step.clip, step.images), (step.original, step.images))
    ]
    for metric in ("l2", "l1", "cos"):
        expected = [np.mean([slow.distance(m, t, metric, size) for m, t in zip(a, maps[2])]) for a in maps[:2]]
        changes = {"attention_variant": variant, "Distance_metric": metric, "distance_size": size}
        found = values(step, "Comp-TGA", SETTINGS.model_copy(update=changes))
        assert [found["L_AR"], found["L_AMC"]] == pytest.approx(expected, rel=1e-3)


def test_while_f_is_f0_images_that_are_not_attacked_have_no_distance_either(mini, step):
    tuned = mini.frozen_copy()
    tuned.visual.requires_grad_(True)
    first = Step(tuned, mini, step.images, step.labels, step.prompts, step.images.clone())  # as epsilon 0 makes them
    assert [term.value.item() for term in OBJECTIVES["TGA-ZSR"].terms(first, SETTINGS)[1:]] == [0, 0]


@pytest.mark.parametrize("name", ["TGA-ZSR", "Comp-TGA", "Vision-based-grad"])
@pytest.mark.parametrize("metric", ["l2", "l1", "cos"])
def test_while_f_is_f0_clean_attention_has_no_distance_and_no_gradient(step, mini, name, metric):
    """Rounding would be made a gradient of half L_AR's size by the norm."""
    tuned = mini.frozen_copy()
    tuned.visual.requires_grad_(True)
    first = Step(tuned, mini, step.images, step.labels, step.prompts, step.adversarial)
    settings = SETTINGS.model_copy(update={"Distance_metric": metric})
    terms = {term.name: term.value for term in OBJECTIVES[name].terms(first, settings)}
    assert first.untouched and terms["L_AMC"].item() == 0 < terms["L_AR"].item()
    slopes = torch.autograd.grad(terms["L_AMC"], list(tuned.visual.parameters()), allow_unused=True)
    assert all(slope is None or not slope.any() for slope in slopes)
    with torch.no_grad():
        tuned.visual.transformer.resblocks[0].mlp.c_proj.weight *= 1.5
    after = Step(tuned, mini, step.images, step.labels, step.prompts, step.adversarial)
    assert not after.untouched and OBJECTIVES[name].terms(after, settings)[2].value.item() > 0


def test_prompts_are_negated():
    assert negated("This is a photo of a cat") == negated("A photo of a cat") == "This is not a photo of a cat"
    assert negated("Tthis is a photo of healthy tissue.") == "This is not a photo of healthy tissue."
    assert negated("A photo of a pug, a type of pet.") == "This is not a photo of a pug, a type of pet."


def test_grad_cam_equals_the_forward_written_out(step):
    """The image encoder's last block by hand, in float64, from the tokens that enter its attention."""
    clip, images = step.clip.frozen_copy(), step.images[:2].double()
    clip.visual.double()
    block = clip.visual.transformer.resblocks[-1]
    entering = []
    handle = block.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    clip.visual((images - clip.mean) / clip.std)
    handle.remove()
    activations = block.ln_1(entering[0]).detach().requires_grad_(True)
    x = entering[0].detach() + block.attn(activations, activations, activations)[0]
    x = clip.visual.ln_post(x + block.mlp(block.ln_2(x)))[:, 0] @ clip.visual.proj
    unit = x / x.norm(dim=1, keepdim=True)
    scale = step.clip.model.logit_scale.detach().exp().clamp(max=100)
    logits = scale * (unit * step.text[step.labels[:2]]).sum()
    (slope,) = torch.autograd.grad(logits, activations)
    expected = []
    for a, g in zip(activations[:, 1:].detach().numpy(), slope[:, 1:].numpy()):
        cam = np.maximum((a * g.mean(0)).sum(1), 0)
        expected.append(((cam - cam.min()) / (cam.max() - cam.min())).reshape(7, 7))
    maps = grad_cam(step.clip, step.images[:2], step.text, step.labels[:2], target="true")
    np.testing.assert_allclose(maps.numpy(), expected, atol=2e-3)


def test_released_grad_cam_trains_nothing_and_the_differentiable_one_does(step):
    released = {t.name: t.value for t in OBJECTIVES["Vision-based"].terms(step, SETTINGS)}
    assert not released["L_AR"].requires_grad and not released["L_AMC"].requires_grad and released["CE"].requires_grad
    trained = {t.name: t.value for t in OBJECTIVES["Vision-based-grad"].terms(step, SETTINGS)}
    assert (
        trained["CE"].item() == released["CE"].item() and trained["L_AR"].item() != released["L_AR"].item()
    )  # targets
    gradients = torch.autograd.grad(trained["L_AR"], step.clip.visual.conv1.weight)
    assert gradients[0].isfinite().all() and gradients[0].abs().max() > 0
    assert all(p.grad is None for p in step.original.parameters())


def test_each_image_passes_the_encoder_once_and_the_original_without_a_graph(step, monkeypatch):
    calls = []
    encode = Clip.encode_image

    def counted(self, pixels):
        tokens = encode(self, pixels)
        calls.append((self is step.clip, len(pixels) / len(step.images), tokens.pooled.requires_grad))
        return tokens

    monkeypatch.setattr(Clip, "encode_image", counted)
    OBJECTIVES["TGA-ZSR"].terms(step, SETTINGS)
    assert sorted(calls) == [(False, 1, False), (True, 2, True)]  # attacked and clean images together
    calls.clear()
    fresh = Step(step.clip, step.original, step.images, step.labels, step.prompts, step.adversarial)
    OBJECTIVES["TeCoA"].terms(fresh, SETTINGS)
    assert calls == [(True, True, True)]


def test_gradients_reach_the_tuned_weights_only(step):
    loss = sum(t.weight * t.value for t in OBJECTIVES["TGA-ZSR"].terms(step, SETTINGS))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step.clip.visual.parameters())
    assert all(p.grad is None for p in step.original.parameters())


def test_adding_a_method_is_adding_one_function(monkeypatch):
    monkeypatch.setattr("tgazsr_utils.core.objectives.OBJECTIVES", dict(OBJECTIVES))
    from tgazsr_utils.core import objectives

    @objective("Mine", lr=0.5, attack=None)
    def mine(step, settings):
        return []

    assert objectives.OBJECTIVES["Mine"].preset["lr"] == 0.5 and "Mine" not in OBJECTIVES


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="setting 'learning_rate' of Mine is unknown; there are: Alpha"):
        objective("Mine", learning_rate=1e-2)
    assert "Mine" not in OBJECTIVES
