"""The image encoder's larger products against open_clip's own modules."""

import copy

import pytest
import torch
from torch import nn

from tgazsr_utils.core.encoder import OneProduct, PatchProduct, with_larger_products
from tgazsr_utils.core.libraries import open_clip


@pytest.fixture(scope="module", params=["ViT-S-32", "ViT-B-16-quickgelu", "mini-clip"])
def pair(request):
    """(open_clip's image encoder of random weights cut to two blocks, the same with larger products)."""
    torch.manual_seed(0)
    visual = open_clip().create_model(request.param).visual.eval()
    visual.transformer.resblocks = visual.transformer.resblocks[:2]
    for parameter in visual.parameters():  # open_clip starts biases at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    visual.output_tokens = True
    ours = copy.deepcopy(visual)
    with_larger_products(ours)
    return visual, ours


def products(visual):
    return [type(m) for m in visual.modules() if isinstance(m, (nn.MultiheadAttention, nn.Conv2d))]


def test_tokens_and_gradients_are_the_same(pair):
    found = []
    for visual in pair:
        pixels = torch.rand(2, 3, *visual.image_size, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        pooled, patches = visual(pixels)
        visual.zero_grad()
        (pooled.square().sum() + patches[:, ::3].sin().sum()).backward()
        found.append([pooled, patches, pixels.grad, *(p.grad for p in visual.parameters())])
    for theirs, ours in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert products(pair[0]) == [nn.Conv2d, nn.MultiheadAttention, nn.MultiheadAttention]
    assert products(pair[1]) == [PatchProduct, OneProduct, OneProduct]


def test_weights_keep_their_names_and_a_copy_is_its_own(pair):
    theirs, ours = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    other, pixels = copy.deepcopy(ours), torch.rand(1, 3, *ours.image_size)
    with torch.no_grad():
        before = ours(pixels)[0]
        other.transformer.resblocks[0].attn.in_proj_weight.mul_(2)
        assert products(other) == products(ours) and torch.equal(ours(pixels)[0], before)
        assert not torch.equal(other(pixels)[0], before)


def test_attention_of_another_kind_stays_as_it_is():
    visual = open_clip().create_model("mini-clip").visual
    visual.transformer.resblocks[0].attn = nn.MultiheadAttention(128, 4, kdim=64, vdim=64, batch_first=True)
    visual.conv1 = nn.Conv2d(3, 128, 8, stride=4, bias=False)
    with_larger_products(visual)
    assert products(visual)[:2] == [nn.Conv2d, nn.MultiheadAttention]
