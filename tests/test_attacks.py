import pytest
import torch
import torch.nn.functional as F

from tgazsr_utils.attacks import pgd

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


def test_one_step_is_the_signed_gradient_at_the_random_start(mini, shapes):
    images, start = attack(mini, shapes, steps=0)
    text = mini.encode_text(shapes.prompts)
    x = start.clone().requires_grad_()
    F.cross_entropy(mini.logits(x, text), shapes.labels).backward()
    expected = (start + x.grad.sign() / 255).clamp(images - EPS, images + EPS).clamp(0, 1)
    assert torch.allclose(attack(mini, shapes, steps=1)[1], expected, atol=1e-6)


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
