import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import size

from tgazsr_utils.core import attacks
from tgazsr_utils.core.attacks import cw, cw_margin, pgd, run_attack
from tgazsr_utils.core.seeds import Noise, seeded
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring.autoattack import VERSIONS, autoattack, square

EPS = 3 / 255


def attack(clip, data, eps=EPS, steps=5, seed=0, **options):
    images = data.images.float() / 255
    generator = torch.Generator().manual_seed(seed)
    text = clip.encode_text(data.prompts)
    return images, pgd(clip, images, data.labels, text, eps, 1 / 255, steps, generator=generator, **options)


@pytest.mark.parametrize("eps", [0, 1 / 255, EPS, 0.1])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_result_is_inside_the_ball_and_the_pixel_range_exactly(mini, shapes, eps, steps):
    images, adversarial = attack(mini, shapes, eps, steps)
    assert ((adversarial.double() - images.double()).abs() <= eps).all()
    assert adversarial.min() >= 0 and adversarial.max() <= 1


def test_it_finds_more_loss_than_noise_of_the_same_size(mini, shapes):
    images, adversarial = attack(mini, shapes)
    text = mini.encode_text(shapes.prompts)
    loss = lambda x: F.cross_entropy(mini.logits(x, text), shapes.labels, reduction="none")
    signs = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).sign()
    noisy = (images + EPS * signs).clamp(0, 1)
    with torch.no_grad():
        assert (loss(adversarial) > loss(noisy)).float().mean() > 0.95
        assert loss(adversarial).mean() > 2 * loss(noisy).mean()


def test_more_steps_find_more_loss(mini, shapes):
    text = mini.encode_text(shapes.prompts)
    losses = []
    for steps in (0, 1, 3, 10):
        _, adversarial = attack(mini, shapes, steps=steps)
        losses.append(F.cross_entropy(mini.logits(adversarial, text), shapes.labels).item())
    assert losses == sorted(losses)


@pytest.mark.parametrize("steps", [100, 99, 45, 24, 15, 8])
def test_a_batch_that_repeats_itself_is_attacked_no_longer(mini, shapes, monkeypatch, steps):
    """With steps as long as epsilon, to the bit what all of the steps give; with short ones none is left out."""
    images, text, made = shapes.images[:8].float() / 255, mini.encode_text(shapes.prompts), []
    step = attacks._step
    monkeypatch.setattr(attacks, "_step", lambda *arguments: made.append(1) or step(*arguments))
    arguments, usual = (mini, images, shapes.labels[:8], text, 1 / 255), attacks.ROUND

    def attacked(size, rounds):
        made.clear()
        monkeypatch.setattr(attacks, "ROUND", rounds)
        return pgd(*arguments, size / 255, steps, generator=seeded("cpu", "start")), len(made)

    (whole, every), (found, taken) = attacked(1, 1000), attacked(1, usual)
    assert torch.equal(whole, found) and every == steps
    assert taken == steps if steps < 30 else taken <= min(steps, 60)
    assert attacked(0.1, usual)[1] == steps


def test_one_step_is_the_signed_gradient_at_the_random_start(mini, shapes):
    images, start = attack(mini, shapes, steps=0)
    text = mini.encode_text(shapes.prompts)
    x = start.clone().requires_grad_()
    F.cross_entropy(mini.logits(x, text), shapes.labels).backward()
    expected = (start + x.grad.sign() / 255).clamp(images - EPS, images + EPS).clamp(0, 1)
    clear = x.grad.abs() > 1e-4 * x.grad.abs().median()  # rounding decides the sign of others
    assert clear.float().mean() > 0.999
    assert torch.allclose(attack(mini, shapes, steps=1)[1][clear], expected[clear], atol=1e-6)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 4.0)])
def test_a_start_that_is_not_cut_leaves_the_pixel_range_and_its_steps_do_not(mini, shapes, monkeypatch, norm, eps):
    seen = []
    encode = attacks.encode
    monkeypatch.setattr(attacks, "encode", lambda clip, x: seen.append(x.detach().clone()) or encode(clip, x))
    images, adversarial = attack(mini, shapes, eps, steps=2, start="uncut", norm=norm)
    assert seen[0].min() < 0 and seen[0].max() > 1 and 0 <= seen[1].min() <= seen[1].max() <= 1
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert attack(mini, shapes, eps, steps=0, start="uncut", norm=norm)[1].min() >= 0
    uncut = seen[0]
    inside = (uncut >= 0) & (uncut <= 1)
    cut = attack(mini, shapes, eps, steps=0, norm=norm)[1]
    torch.testing.assert_close(cut[inside], uncut[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("start, protocol", [("foo", "last"), (None, "last"), ("uncut", "worst")])
def test_other_starts_are_refused(mini, shapes, start, protocol):
    with pytest.raises(ValueError, match="choose 'cut', or 'uncut' where protocol is 'last'"):
        attack(mini, shapes, start=start, protocol=protocol)


def test_the_released_fp16_attack_loses_gradients_and_finds_less(mini, shapes):
    """Pixel gradients of the mean cross-entropy of 256 images, without a scaled loss, fall below fp16's range."""
    data, text = shapes.subset(12), mini.encode_text(shapes.prompts)
    images = data.images.float() / 255
    usual = AttackSettings(test_eps=8, test_stepsize=2, test_numsteps=3)
    released = AttackSettings(**usual.model_dump() | {"attack_precision": "released-fp16"})
    loss = {}
    for settings in (usual, released):
        found = run_attack(mini, images, data.labels, text, settings, "last", Noise.named(torch.arange(12), 0))
        assert found.dtype == torch.float32 and (found - images).abs().max() <= 8 / 255 + 1e-6
        loss[settings.label] = F.cross_entropy(mini.logits(found, text), data.labels).item()
    assert loss["pgd-3"] > loss["pgd-3-released-fp16"] > F.cross_entropy(mini.logits(images, text), data.labels)
    assert mini.numerics.precision == "fp32"  # the model that was given stays as it is
    with pytest.raises(ValueError, match="protocol 'last'"):
        run_attack(mini, images, data.labels, text, released, "worst", None)


def test_only_the_pixels_gradient_is_taken(mini, shapes, monkeypatch):
    clip = mini.frozen_copy()
    clip.visual.requires_grad_(True)
    text = clip.encode_text(shapes.prompts)
    monkeypatch.setattr(type(clip.model), "encode_text", lambda *a, **k: pytest.fail("text was encoded"))
    images = shapes.images.float() / 255
    adversarial = pgd(clip, images, shapes.labels, text, EPS, 1 / 255, 2)
    assert all(p.grad is None for p in clip.parameters())
    assert not adversarial.requires_grad


def test_the_generator_decides_the_result(mini, shapes):
    first, second, other = (attack(mini, shapes, seed=s)[1] for s in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_an_attack_loss_of_ones_own_is_followed(mini, shapes):
    """Driving every image towards class 0 raises its probability."""
    text = mini.encode_text(shapes.prompts)
    towards = lambda tokens: mini.similarity(tokens.pooled, text).log_softmax(1)[:, 0].sum()
    images, adversarial = attack(mini, shapes, loss=towards)
    probability = lambda x: mini.logits(x, text).softmax(1)[:, 0].mean()
    with torch.no_grad():
        assert probability(adversarial) > probability(images) + 0.2


def test_bad_input_is_named(mini, shapes):
    text = mini.encode_text(shapes.prompts)
    with pytest.raises(ValueError, match="range from 0 to 255"):
        pgd(mini, shapes.images.float() / shapes.images.max() * 255, shapes.labels, text, EPS, EPS, 1)
    with pytest.raises(ValueError, match="eps is -1"):
        pgd(mini, shapes.images.float() / 255, shapes.labels, text, -1, EPS, 1)


def test_cw_follows_the_margin(generator):
    """-sum relu(correct - best wrong + 50), REFERENCE Q6, image by image in float64."""
    logits, labels = 60 * torch.randn(20, 5, generator=generator), torch.arange(20) % 5
    total = 0.0
    for row, label in zip(logits.double().numpy(), labels.tolist()):
        total -= max(0.0, row[label] - max(np.delete(row, label)) + 50)
    assert cw_margin(logits, labels).item() == pytest.approx(total)
    assert any(row[label] - max(np.delete(row, label)) < -50 for row, label in zip(logits.numpy(), labels.tolist()))


def test_cw_is_pgd_on_that_margin(mini, shapes):
    images, text = shapes.images.float() / 255, mini.encode_text(shapes.prompts)
    margin = lambda tokens: cw_margin(mini.similarity(tokens.pooled, text), shapes.labels)
    seeded = lambda: torch.Generator().manual_seed(0)
    by_hand = attack(mini, shapes, steps=3, loss=margin)[1]
    assert torch.equal(cw(mini, images, shapes.labels, text, EPS, 1 / 255, 3, generator=seeded()), by_hand)
    assert not torch.equal(attack(mini, shapes, steps=3)[1], by_hand)


@pytest.mark.parametrize("steps", [0, 4])
def test_the_l2_ball(mini, shapes, steps):
    eps = 128 / 255
    images, text = shapes.images.float() / 255, mini.encode_text(shapes.prompts)
    run = lambda steps, size: pgd(
        mini, images, shapes.labels, text, eps, size, steps, norm="l2", generator=torch.Generator().manual_seed(0)
    )
    adversarial = run(steps, eps / 2)
    distance = (adversarial.double() - images.double()).flatten(1).norm(dim=1)
    assert (distance <= eps * (1 + 1e-5)).all() and adversarial.min() >= 0 and adversarial.max() <= 1
    if steps:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        noisy = (images + eps * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
        loss = lambda x: F.cross_entropy(mini.logits(x, text), shapes.labels)
        assert loss(adversarial) > 2 * loss(noisy)
    else:  # a step of the gradient's direction, of the given length
        x = adversarial.clone().requires_grad_()
        F.cross_entropy(mini.logits(x, text), shapes.labels, reduction="sum").backward()
        direction = x.grad / x.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = adversarial + 0.01 * direction - images
        expected *= (eps / expected.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        assert torch.allclose(run(1, 0.01), (images + expected).clamp(0, 1), atol=1e-6)


def test_worst_counts_every_iterate_and_its_work_shrinks(mini, shapes, passes):
    text, steps = mini.encode_text(shapes.prompts), 6
    wrong = lambda x: mini.logits(x, text).argmax(1) != shapes.labels
    images, adversarial = attack(mini, shapes, steps=steps, protocol="worst")
    sizes = [n for n, _ in passes]
    ever = wrong(images)
    for k in range(steps + 1):  # the same start and the same steps, cut off after k of them
        ever |= wrong(attack(mini, shapes, steps=k)[1])
    last = wrong(attack(mini, shapes, steps=steps)[1])
    assert (wrong(adversarial) != ever).sum() <= 1  # another batch may round the odd one otherwise
    assert (last & ~wrong(adversarial)).sum() <= 1 and 0 < last.sum() <= ever.sum() < len(shapes)
    assert sizes[0] == len(shapes) and sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.8 * len(shapes)
    assert ((adversarial.double() - images.double()).abs() <= EPS).all()


@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 100 / 255)])
def test_autoattack_finds_at_least_what_pgd_does(mini, shapes, norm, eps):
    shapes = shapes.subset(size(16, 40), 0)
    images, text = shapes.images.float() / 255, mini.encode_text(shapes.prompts)
    right = lambda x: (mini.logits(x, text).argmax(1) == shapes.labels).sum()
    seeded = lambda: torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    adversarial = autoattack(mini, images, shapes.labels, text, eps, steps=20, norm=norm, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(
        adversarial, autoattack(mini, images, shapes.labels, text, eps, steps=20, norm=norm, generator=seeded())
    )
    weaker = pgd(mini, images, shapes.labels, text, eps, eps / 4, 5, norm=norm, generator=seeded())
    assert right(adversarial) <= right(weaker) < right(images)
    delta = (adversarial.double() - images.double()).flatten(1)
    assert (delta.abs().amax(1) <= eps).all() if norm == "linf" else (delta.norm(dim=1) <= eps * (1 + 1e-5)).all()
    assert adversarial.min() >= 0 and adversarial.max() <= 1


PARTS = {  # version and number of classes -> what is run
    ("apgd-ce", 9): ["apgd-ce"],
    ("apgd", 2): ["apgd-ce"],
    ("apgd", 3): ["apgd-ce", "apgd-dlr"],
    ("apgd-t", 2): ["apgd-ce"],
    ("apgd-t", 3): ["apgd-ce"],
    ("apgd-t", 4): ["apgd-ce", "apgd-t"],
    ("apgd-t", 12): ["apgd-ce", "apgd-t"],
}


@pytest.mark.parametrize("version, classes", PARTS)
def test_a_part_of_autoattack_that_needs_more_classes_is_left_out(mini, version, classes, monkeypatch):
    """And there are no more targets than classes, and at most nine."""
    import pyautoattack

    chosen = []

    class Watched(pyautoattack.AutoAttack):
        def run_standard_evaluation(self, *args, **options):
            chosen.extend(self.attacks_to_run)
            for part in (self.apgd, self.apgd_targeted):
                assert part.n_iter == 3 and part.n_restarts == 1
            assert self.apgd_targeted.n_target_classes == min(9, classes - 1)
            return super().run_standard_evaluation(*args, **options)

    monkeypatch.setattr(pyautoattack, "AutoAttack", Watched)
    data = load_dataset("colour_shapes", "test", n=12)
    text = mini.encode_text(data.prompts)[:classes]
    autoattack(mini, data.images.float() / 255, data.labels % classes, text, EPS, steps=3, version=version)
    assert chosen == PARTS[version, classes] and len(text) == classes


@pytest.mark.parametrize("classes", [2, 4, 6])
def test_the_standard_autoattack_runs_all_its_attacks(mini, classes, monkeypatch):
    """At epsilon 0 every image withstands all four; fewer steps than the published ones, so that it ends soon."""
    import pyautoattack

    ran = []

    class Hurried(pyautoattack.AutoAttack):
        def run_standard_evaluation(self, *args, **options):
            targets = [self.apgd_targeted.n_target_classes, self.fab.n_target_classes]
            assert targets == [min(9, classes - 1)] * 2 and self.square.n_queries == 5000
            assert [(part.n_iter, part.n_restarts) for part in (self.apgd, self.apgd_targeted)] == [(100, 1)] * 2
            for name in ("apgd", "apgd_targeted", "fab", "square"):
                part = getattr(self, name)
                part.n_iter, part.n_queries = 2, 2
                monkeypatch.setattr(
                    part, "perturb", lambda *a, f=part.perturb, n=name, **k: ran.append(n) or f(*a, **k)
                )
            return super().run_standard_evaluation(*args, **options)

    monkeypatch.setattr(pyautoattack, "AutoAttack", Hurried)
    data = load_dataset("shapes", "test", n=12)
    few = data.subset(4, 0)
    images, text = few.images.float() / 255, mini.encode_text(data.prompts)[:classes]
    labels = mini.logits(images, text).argmax(1)
    assert torch.equal(autoattack(mini, images, labels, text, 0.0, steps=7, version="standard"), images)
    assert ran == ["apgd", *(["apgd_targeted"] if classes > 3 else []), "fab", "square"]


def outcomes(mini, data, names, eps=3):
    """Which images each attack leaves right, by name, all by ``run_attack``."""
    text, images = mini.encode_text(data.prompts), data.images.float() / 255
    right, noise = {}, Noise(0, torch.arange(len(data)))
    for name in names:
        settings = AttackSettings(attack=name, test_eps=eps, test_stepsize=1, test_numsteps=5, square_queries=20)
        attacked = run_attack(mini, images, data.labels, text, settings, "last", noise)
        assert ((attacked.double() - images.double()).abs() <= eps / 255 + 1e-7).all()
        right[name] = mini.logits(attacked, text).argmax(1) == data.labels
    return right


def test_every_attack_runs_by_its_name_and_none_is_weaker_than_its_parts(mini):
    data = load_dataset("colour_shapes", "test", n=size(12, 40))  # more than ten classes
    right = outcomes(mini, data, ["pgd", "cw", "apgd-ce", "apgd", "apgd-t", "square"])
    left = {name: int(of.sum()) for name, of in right.items()}
    clean = (mini.logits(data.images.float() / 255, mini.encode_text(data.prompts)).argmax(1) == data.labels).sum()
    assert not (right["apgd"] & ~right["apgd-ce"]).any() and not (right["apgd-t"] & ~right["apgd-ce"]).any()
    assert max(left["apgd"], left["apgd-t"]) <= left["apgd-ce"] <= left["pgd"] + 1 < left["square"] <= clean


@pytest.mark.long
def test_the_whole_autoattack_leaves_no_more_than_any_other(mini):
    data = load_dataset("shapes", "test", n=4)
    left = {
        name: int(of.sum()) for name, of in outcomes(mini, data, ["pgd", "apgd-t", "square", "standard"], 2).items()
    }
    assert left["standard"] == min(left.values()) < 4


def test_the_square_attack_repeats_itself_and_gives_the_clean_image_where_none_fools(mini, shapes):
    shapes = shapes.subset(16, 0)
    text, images, seeded = mini.encode_text(shapes.prompts), shapes.images.float() / 255, torch.Generator().manual_seed
    run = lambda seed: square(mini, images, shapes.labels, text, 8 / 255, steps=20, generator=seeded(seed))
    found = run(0)
    assert torch.equal(found, run(0)) and not torch.equal(found, run(1))
    kept = (found == images).flatten(1).all(1)
    right = lambda x: mini.logits(x, text).argmax(1) == shapes.labels
    assert torch.equal(kept, right(found) | ~right(images)) and 0 < kept.sum() < len(shapes)


@pytest.mark.parametrize("run", [pgd, cw, autoattack, square])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_empty_batch_and_half_precision(mini, shapes, run, norm):
    text, few = mini.encode_text(shapes.prompts), shapes.subset(3, 0)
    images = few.images.float() / 255
    assert run(mini, images[:0], few.labels[:0], text, EPS, EPS, 2, norm=norm).shape == (0, *images.shape[1:])
    if run in (pgd, cw):
        adversarial = run(mini, images.half(), few.labels, text, EPS, EPS, 2, norm=norm, protocol="worst")
        assert adversarial.dtype == torch.float16


def test_an_attack_of_many_passes_is_seen_to_go_on(mini, shapes, monkeypatch, capsys):
    """After a while; how often the model was asked, in a line every few seconds."""
    monkeypatch.setenv("TGAZSR_HEADLESS", "1")
    text, few = mini.encode_text(shapes.prompts), shapes.subset(2, 0)
    run = lambda: square(mini, few.images.float() / 255, few.labels, text, 1 / 255, steps=30)
    monkeypatch.setattr("tgazsr_utils.measuring.autoattack.PATIENCE", 3600.0)
    quick = run()
    assert not capsys.readouterr().out
    monkeypatch.setattr("tgazsr_utils.measuring.autoattack.PATIENCE", 0.0)
    monkeypatch.setattr("tgazsr_utils.progress.SECONDS", 0.0)
    assert torch.equal(run(), quick)
    lines = capsys.readouterr().out.split("\n")
    assert "square: 30 passes" in [line.split(" [")[0] for line in lines], lines


def test_autoattack_leaves_tracing_as_it_was(mini, shapes):
    text, few = mini.encode_text(shapes.prompts), shapes.subset(2, 0)
    tracer, before = (lambda *a: None), sys.gettrace()
    sys.settrace(tracer)
    try:
        autoattack(mini, few.images.float() / 255, few.labels, text, EPS, steps=1)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


def test_bad_choices_of_an_attack_are_named(mini, shapes):
    text, few = mini.encode_text(shapes.prompts), shapes.subset(2, 0)
    images = few.images.float() / 255
    run = lambda attack, *a, **o: attack(mini, images, few.labels % 3, text[:3], EPS, EPS, 1, *a, **o)
    with pytest.raises(ValueError, match="norm 'l1' is unknown; choose 'linf' or 'l2'"):
        run(pgd, norm="l1")
    with pytest.raises(ValueError, match="norm 'l1' is unknown"):
        run(autoattack, norm="l1")
    with pytest.raises(ValueError, match="protocol 'best' is unknown"):
        run(pgd, protocol="best")
    with pytest.raises(ValueError, match="worst.*no loss of one's own"):
        run(pgd, protocol="worst", loss=lambda tokens: tokens.pooled.sum())
    with pytest.raises(ValueError, match="norm 'l1' is unknown"):
        run(square, norm="l1")
    with pytest.raises(ValueError, match=f"version 'fast' is unknown; choose of {', '.join(VERSIONS)}"):
        run(autoattack, version="fast")
