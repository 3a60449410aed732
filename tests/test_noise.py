"""Random starts: by integer arithmetic from seed, row and place, whatever the batch."""

import pytest
import torch
from scipy.stats import kstest

from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.seeds import Noise

MASK = 2**64 - 1


def mixed(x):
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def test_it_is_splitmix64():
    # Of a counter alone that is the generator's known sequence: from state 0 its first numbers are these.
    assert [mixed(k * 0x9E3779B97F4A7C15 & MASK) for k in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    rows = torch.tensor([0, 7, 2**40])
    drawn = Noise(123456789, rows).uniform(2, 3)
    for values, row in zip(drawn, rows.tolist()):
        key = mixed(row + 123456789)
        expected = [(mixed(key + k * 0x9E3779B97F4A7C15 & MASK) >> 40) / 2**24 for k in range(1, 7)]
        assert values.flatten().tolist() == expected


def test_an_images_numbers_do_not_depend_on_its_batch():
    together = Noise.named(torch.arange(50), "a", 1).uniform(3, 4, 4)
    apart = [Noise.named(rows, "a", 1).uniform(3, 4, 4) for rows in torch.arange(50).split(7)]
    assert torch.equal(together, torch.cat(apart)) and together.shape == (50, 3, 4, 4)
    assert torch.equal(together[[9, 3]], Noise.named(torch.tensor([9, 3]), "a", 1).uniform(3, 4, 4))


def test_rows_places_and_names_are_independent():
    drawn = Noise.named(torch.arange(400), "a").uniform(300)
    other = Noise.named(torch.arange(400), "b").uniform(300)
    assert kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3 and 0 <= drawn.min() <= drawn.max() < 1
    pairs = [(drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn, other)]
    for a, b in pairs:
        both = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))
        assert abs(both[0, 1]) < 4 / a.numel() ** 0.5


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 2.0)])
def test_a_start_fills_its_ball(mini, norm, eps):
    """Uniform in the ball: linf each pixel; l2 the radius to the power of the dimension, and no direction preferred."""
    images, labels = torch.full((64, 3, 56, 56), 0.5), torch.zeros(64, dtype=torch.long)
    text = mini.encode_text(["a", "b"])
    delta = pgd(mini, images, labels, text, eps, 0, 0, norm=norm, generator=Noise(5, torch.arange(64))) - images
    if norm == "linf":
        assert kstest((delta / eps).flatten().numpy(), "uniform", (-1, 2)).pvalue > 1e-3
        return
    flat = delta.flatten(1).double()
    assert kstest((flat.norm(dim=1) / eps).pow(flat.shape[1]).numpy(), "uniform").pvalue > 1e-3
    assert (
        kstest((flat / flat.norm(dim=1, keepdim=True) * flat.shape[1] ** 0.5).flatten().numpy(), "norm").pvalue > 1e-3
    )
    assert (flat @ flat.T / eps**2 - torch.eye(64)).abs().max() < 0.1
