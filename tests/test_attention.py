import numpy as np
import pytest
import slow_reference as slow
import torch

from tgazsr_utils.core.attention import (
    attention_distance,
    complementary_attention,
    min_max,
    min_max_at,
    resize,
    text_guided_attention,
)
from tgazsr_utils.core.models import ImageTokens
from tgazsr_utils.measuring.attention_shift import as_frame, attention_shift, centre_of_mass


def random_tokens(generator, batch=3, patches=9, width=5):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    return ImageTokens(draw(batch, width), draw(batch, patches, width)), draw(batch, width)


@pytest.mark.parametrize("variant", ["reference", "cosine"])
def test_maps_equal_the_slow_formula(variant, generator):
    tokens, text = random_tokens(generator)
    maps = text_guided_attention(tokens, text, variant)
    for i in range(3):
        expected = slow.attention(tokens.pooled[i].numpy(), tokens.patches[i].numpy(), text[i].numpy(), variant)
        np.testing.assert_allclose(maps[i].numpy(), expected.reshape(3, 3), rtol=1e-12, atol=1e-12)


def test_the_class_token_counts_only_in_the_reference_variant(generator):
    tokens, text = random_tokens(generator)
    other = ImageTokens(tokens.pooled * 10, tokens.patches)
    same = lambda variant: torch.equal(
        text_guided_attention(tokens, text, variant), text_guided_attention(other, text, variant)
    )
    assert same("cosine") and not same("reference")


@pytest.mark.parametrize("size", [7, 20])
def test_resizing_equals_the_slow_formula(size, generator):
    tokens, text = random_tokens(generator)
    small, large = text_guided_attention(tokens, text), text_guided_attention(tokens, text, size=size)
    np.testing.assert_allclose(large[1].numpy(), slow.bilinear(small[1].numpy(), size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["reference", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_map_is_zero_with_finite_gradients(variant, dtype, generator):
    row = torch.randn(1, 1, 6, generator=generator, dtype=dtype)
    patches = row.expand(2, 16, 6).clone().requires_grad_()
    pooled = torch.randn(2, 6, generator=generator, dtype=dtype).requires_grad_()
    maps = text_guided_attention(
        ImageTokens(pooled, patches), torch.randn(6, generator=generator, dtype=dtype), variant
    )
    assert (maps == 0).all()
    maps.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (patches, pooled) if t.grad is not None)
    assert patches.grad is not None


@pytest.mark.parametrize("variant", ["reference", "cosine"])
@pytest.mark.parametrize("metric", ["l2", "l1", "cos"])
def test_gradients_are_right(variant, metric, generator):
    tokens, text = random_tokens(generator, batch=2, patches=4, width=3)
    target = torch.rand(2, 2, 2, dtype=torch.float64, generator=generator)

    def loss(pooled, patches):
        maps = text_guided_attention(ImageTokens(pooled, patches), text, variant)
        return attention_distance(maps, target, metric, size=6)

    inputs = tokens.pooled.requires_grad_(), tokens.patches.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("metric", ["l2", "l1", "cos"])
def test_distances_equal_the_slow_formula(metric, generator):
    a, b = torch.rand(2, 4, 3, 3, dtype=torch.float64, generator=generator)
    found = attention_distance(a, b, metric, size=31)
    expected = [slow.distance(x.numpy(), y.numpy(), metric, 31) for x, y in zip(a, b)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("metric", ["l2", "cos"])
@pytest.mark.parametrize("grid, size", [((7, 7), 224), ((14, 14), 224), ((5, 9), 40), ((16, 16), 7)])
def test_distances_without_resized_maps_equal_those_with_them(metric, grid, size, generator):
    """To 1e-5 relative in fp32, gradients included, against the resized maps in float64."""
    a, b = (min_max(torch.rand(6, grid[0] * grid[1], generator=generator)).unflatten(1, grid) for _ in range(2))
    fast, exact = a.clone().requires_grad_(), a.double().requires_grad_()
    found = attention_distance(fast, b, metric, size)
    expected = attention_distance(resize(exact, size), resize(b.double(), size), metric, size=None)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    error = (fast.grad.double() - exact.grad).flatten(1).norm(dim=1) / exact.grad.flatten(1).norm(dim=1)
    assert (error < 1e-5).all()


@pytest.mark.parametrize("metric", ["l2", "l1", "cos"])
@pytest.mark.parametrize("grid, size", [((7, 7), 224), ((14, 14), 224), ((5, 9), 40)])
def test_complementary_maps_at_nodes_and_halfway_hold_the_product_of_resized_maps(metric, grid, size, generator):
    """To 1e-5 relative in fp32, gradients included, against products of resized maps in float64."""
    patches = grid[0] * grid[1]
    tokens = [random_tokens(generator, patches=patches)[0] for _ in range(2)]
    text, not_text = torch.nn.functional.normalize(torch.randn(2, 3, 5, generator=generator), dim=-1)
    texts = {"text": text, "not_text": not_text, "grid": grid}
    exact = [ImageTokens(*(part.clone().requires_grad_() for part in side)) for side in tokens]
    fast = [ImageTokens(*(part.float().requires_grad_() for part in side)) for side in tokens]
    nodes = [complementary_attention(side, **texts, size="nodes") for side in fast]
    assert nodes[0].shape[1:] == (2 * grid[0] - 1, 2 * grid[1] - 1)
    found = attention_distance(*nodes, metric, size, degree=2)
    doubled = texts | {"text": text.double(), "not_text": not_text.double()}
    products = [complementary_attention(side, **doubled, size=size) for side in exact]
    expected = attention_distance(*products, metric, size=None)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6 if metric == "cos" else 0)
    found.sum().backward(), expected.sum().backward()
    error = (fast[0].patches.grad - exact[0].patches.grad).norm() / exact[0].patches.grad.norm()
    assert error < (1e-3 if metric == "l1" else 1e-4)  # l1: the sign of what is nearly equal


def test_maps_scaled_at_a_size_span_the_range_there(generator):
    scores = torch.rand(3, 4, 5, generator=generator)
    there = resize(min_max_at(scores, 31), 31)
    torch.testing.assert_close(there.amin((1, 2)), torch.zeros(3))
    torch.testing.assert_close(there.amax((1, 2)), torch.ones(3))
    torch.testing.assert_close(there, min_max(resize(scores, 31).flatten(1)).view(3, 31, 31))
    assert not min_max_at(torch.ones(1, 4, 5), 31).any()


def test_equal_maps_have_no_distance_and_no_gradient(generator):
    a = torch.rand(2, 3, 3, generator=generator).requires_grad_()
    distance = attention_distance(a, a.detach(), "l2")
    distance.sum().backward()
    assert (distance == 0).all() and (a.grad == 0).all()


def test_a_channel_that_is_zero_everywhere_has_finite_gradients(generator):
    patches = torch.randn(1, 4, 3, generator=generator)
    patches[..., 0] = 0
    patches.requires_grad_()
    pooled = torch.zeros(1, 3, requires_grad=True)
    text_guided_attention(ImageTokens(pooled, patches), torch.ones(3)).square().sum().backward()
    assert patches.grad.isfinite().all() and pooled.grad.isfinite().all()


def test_unknown_names_are_refused(generator):
    tokens, text = random_tokens(generator)
    with pytest.raises(ValueError, match="'paper'.*'reference' or 'cosine'"):
        text_guided_attention(tokens, text, "paper")
    with pytest.raises(ValueError, match="'l3'"):
        attention_distance(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), "l3")
    with pytest.raises(ValueError, match="10 patches"):
        text_guided_attention(random_tokens(generator, patches=10)[0], text)
    assert text_guided_attention(random_tokens(generator, patches=10)[0], text, grid=(2, 5)).shape == (3, 2, 5)


def test_shift_measures_on_maps_worked_out_by_hand():
    clean, adv = torch.zeros(1, 5, 5), torch.zeros(1, 5, 5)
    clean[0, 0, :] = 1  # the top row is the top fifth
    adv[0, 4, :] = 1
    mask = torch.zeros(1, 10, 10, dtype=torch.bool)
    mask[0, :2] = True  # covers the top row exactly
    row = as_frame(attention_shift(clean, adv, mask)).iloc[0]
    assert row.l2 == pytest.approx(10**0.5)
    assert row.cosine == pytest.approx(0, abs=1e-6)
    assert row.iou_top20 == 0
    assert row.centre_move == pytest.approx(4)
    assert (row.energy_clean, row.energy_adv, row.energy_uniform) == pytest.approx((1, 0, 0.2))
    same = as_frame(attention_shift(clean, clean, mask)).iloc[0]
    assert (same.l2, same.cosine, same.iou_top20, same.centre_move) == pytest.approx((0, 1, 1, 0), abs=1e-6)


def test_the_centre_of_an_empty_map_is_its_middle():
    assert centre_of_mass(torch.zeros(1, 3, 5)).tolist() == [[1, 2]]
