"""The very kernels, on the CPU by Triton's interpreter (on the device where there is one), against float64."""

import pytest
import torch
from conftest import check_same_training

from tgazsr_utils.core.attention import complementary_attention, text_guided_attention
from tgazsr_utils.core.models import ImageTokens
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.parameters import TrainNotebook, validate
from tgazsr_utils.profiles import default_parameters
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.weights import load_clip

attention = pytest.importorskip("tgazsr_utils.core.attention_kernel").attention  # which needs Triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 49, 512), (2, 7, 33), (2, 50, 100), (1, 1024, 96), (1, 256, 1280), (2, 3, 5), (64, 49, 24)]


def draw(generator, batch, patches, width, texts=1, dtype=torch.float32):
    shapes = (batch, width), (batch, patches, width), *[(batch, width)] * texts
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def maps_and_gradients(function, inputs, weights):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    maps = function(*leaves)
    (maps * weights.to(maps)).sum().backward()
    return maps.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def single(variant, backend):
    return lambda pooled, patches, text: text_guided_attention(
        ImageTokens(pooled, patches), text, variant, grid=(1, patches.shape[1]), backend=backend
    )


def pair(variant, backend):
    return lambda pooled, patches, text, other: complementary_attention(
        ImageTokens(pooled, patches), text, other, variant, grid=(1, patches.shape[1]), backend=backend
    )


def close(found, expected, tolerance):
    """To ``tolerance`` of the greatest value."""
    return (found.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("make, texts", [(single, 1), (pair, 2)], ids=["text", "complementary"])
@pytest.mark.parametrize("variant", ["reference", "cosine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_and_gradients_equal_float64(shape, variant, make, texts, generator):
    inputs = draw(generator, *shape, texts)
    weights = torch.randn(shape[0], 1, shape[1], generator=generator)
    maps, gradients = maps_and_gradients(make(variant, "triton"), inputs, weights)
    exact, expected = maps_and_gradients(make(variant, "torch"), [x.double() for x in inputs], weights)
    assert maps.dtype == torch.float32 and close(maps, exact, 1e-6)
    for name, found, wanted in zip(("pooled", "patches", "text", "not_text"), gradients, expected):
        assert close(found, wanted, 1e-5), name


@pytest.mark.parametrize("variant", ["reference", "cosine"])
@pytest.mark.parametrize(
    "dtype, rounding", [(torch.float16, 2**-11), (torch.bfloat16, 2**-7)]
)  # the interpreter cuts bf16 off
def test_half_precision_tokens_are_summed_in_fp32(dtype, rounding, variant, generator):
    """Maps are as exact as for fp32 tokens; gradients are rounded once, to the tokens' type."""
    inputs = draw(generator, 2, 49, 256, dtype=dtype)
    weights = torch.randn(2, 1, 49, generator=generator)
    maps, gradients = maps_and_gradients(single(variant, "triton"), inputs, weights)
    exact, expected = maps_and_gradients(single(variant, "torch"), [x.double() for x in inputs], weights)
    assert maps.dtype == torch.float32 and close(maps, exact, 1e-6)
    for found, wanted in zip(gradients, expected):
        assert found.dtype == dtype and close(found, wanted, rounding + 1e-5)


@pytest.mark.parametrize("variant", ["reference", "cosine"])
def test_constant_maps_are_zero_with_zero_gradients(variant, generator):
    pooled, patches, text = draw(generator, 3, 16, 40)
    patches[0] = patches[0, :1]  # equal patches
    patches[1] = 0
    pooled[1] = 0
    maps, gradients = maps_and_gradients(single(variant, "triton"), (pooled, patches, text), torch.ones(3, 1, 16))
    assert (maps[:2] == 0).all() and maps[2].max() == 1
    assert all(g.isfinite().all() and (g[:2] == 0).all() for g in gradients)


@pytest.mark.parametrize("variant", ["reference", "cosine"])
def test_patches_that_share_an_extreme_share_its_gradient(variant, generator):
    inputs = draw(generator, 1, 9, 20)
    scores = single(variant, "torch")(*inputs).flatten()
    for extreme, twin in ((scores.argmax(), 0), (scores.argmin(), 1)):
        inputs[1][0, twin] = inputs[1][0, extreme]
    weights = torch.randn(1, 1, 9, generator=generator)
    _, found = maps_and_gradients(single(variant, "triton"), inputs, weights)
    _, wanted = maps_and_gradients(single(variant, "torch"), [x.double() for x in inputs], weights)
    assert all(close(a, b, 1e-5) for a, b in zip(found, wanted))


@pytest.mark.parametrize("variant", ["reference", "cosine"])
def test_it_is_one_well_behaved_operator(variant, generator):
    pooled, patches, text = (x.requires_grad_() for x in draw(generator, 2, 9, 20))
    torch.library.opcheck(attention, (pooled, patches, text[:, None], variant))

    attend = single(variant, "triton")
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pooled, patches, text), attend(pooled, patches, text))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(attend(pooled, patches, text), single(variant, "triton")(pooled, patches, text))
        assert attend(pooled, patches, text).dtype == torch.float32


def test_the_choice_can_be_forced_and_is_checked(generator, monkeypatch):
    inputs = draw(generator, 2, 9, 20)
    single("cosine", "auto")(*inputs)  # on a GPU tries once whether the kernel works
    calls = []
    monkeypatch.setattr("tgazsr_utils.core.attention_kernel.attention", lambda *a: calls.append(1) or attention(*a))
    for backend, expected in (("torch", 0), ("triton", 1), ("auto", int(DEVICE == "cuda"))):
        calls.clear()
        single("cosine", backend)(*inputs)
        assert len(calls) == expected
    with pytest.raises(ValueError, match="backend 'cuda' is unknown; choose 'auto', 'triton' or 'torch'"):
        single("cosine", "cuda")(*inputs)
    with pytest.raises(ValueError, match="1025 patches"):
        single("cosine", "triton")(*draw(generator, 1, 1025, 4))


@pytest.mark.parametrize("method", ["TGA-ZSR", "Comp-TGA"])
def test_training_through_the_kernel_is_training_without(mini, tmp_path, method):
    """Two steps: the same losses and weights up to rounding. Without L_AMC, which is zero at first but for rounding,
    while the gradient of a norm there has length one in whichever direction rounding points."""
    data = load_dataset("shapes", "train", n=8)
    settings = validate(
        TrainNotebook, default_parameters("02_train_tga_zsr") | {"batch_size": 4, "Beta": 0.0}
    ).finetuning(method)
    clip = load_clip("mini-clip", "mini", DEVICE)
    run = lambda backend: finetune(
        clip, data, method, settings.model_copy(update={"attention_backend": backend}), tmp_path
    )
    with_kernel, without = run("triton"), run("torch")
    check_same_training(with_kernel, without, clip)


def test_an_empty_batch_and_strided_tokens(generator):
    pooled, patches, text = draw(generator, 2, 9, 20)
    assert single("reference", "triton")(pooled[:0], patches[:0], text[:0]).shape == (0, 1, 9)
    strided = patches.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        single("reference", "triton")(pooled, strided, text), single("reference", "triton")(pooled, patches, text)
    )
