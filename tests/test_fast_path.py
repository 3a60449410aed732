"""Compiling and autocast: what they may not change, and what they must not do."""

import contextlib
import functools
import shutil
from collections import Counter

import pytest
import torch
from conftest import check_same_training, disagreements, only_long, size, train_settings
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from tgazsr_utils.core import encoder
from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.attention import grad_cam
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import OBJECTIVES
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring.measure import evaluate
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.weights import load_clip

SETTINGS = train_settings(Beta=0.0, lr=1e-4, train_numsteps=2)
ATTACK = AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=3)


@contextlib.contextmanager
def compiled_by(backend):
    encoder._compile.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
        yield
    encoder._compile.cache_clear()


@pytest.fixture(scope="module")
def graphs():
    """Compiles to PyTorch's own operators: the graphs are those of the default, without a minute of code generation."""
    with compiled_by("aot_eager"):
        yield


@pytest.fixture(scope="module")
def compiled():
    return load_clip("mini-clip", "mini", "cpu", compiled=True)


@pytest.fixture(scope="module")
def train_set():
    return load_dataset("shapes", "train", n=20)  # the last batch is short


TRIED = ["TGA-ZSR"]  # FARE's attack is of the other kind, on a loss of the method's own
OTHERS = only_long(*(name for name in OBJECTIVES if name not in (*TRIED, "Vision-based")))


@pytest.mark.parametrize("method", [*TRIED, *OTHERS])
def test_a_compiled_model_trains_alike(mini, compiled, graphs, train_set, tmp_path, method):
    settings = SETTINGS.model_copy(update={"lr": 1e-2 if method == "PMG-AFT" else 1e-4})
    plain, fast = (
        finetune(clip, train_set, method, settings, tmp_path / str(clip.numerics.compiled)) for clip in (mini, compiled)
    )
    check_same_training(plain, fast, mini)
    assert fast.clip.numerics.compiled and not plain.clip.numerics.compiled


L2 = {"norm": "l2", "test_eps": 100, "test_stepsize": 30}
SHORT = [("worst", L2 | {"attack": "cw"})]
LONG = [
    ("last", {}),
    ("worst", {}),
    ("last", {"attack": "cw"}),
    ("worst", {"attack": "cw"}),
    ("last", L2),
    ("worst", L2),
]


@pytest.mark.parametrize(
    ("protocol", "changes"), [*SHORT, *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG)]
)
def test_a_compiled_model_gives_the_same_record(mini, compiled, graphs, protocol, changes):
    attack, data = AttackSettings(**ATTACK.model_dump() | changes), load_dataset("letters", "test", n=30)
    plain, fast = (evaluate(clip, data, attack, protocol, method="CLIP") for clip in (mini, compiled))
    assert disagreements(fast, plain) <= 1 and fast.key != plain.key


@pytest.mark.parametrize("norm", ["linf", *only_long("l2")])
def test_one_graph_serves_all_models_sizes_classes_and_lengths(compiled, graphs, shapes, norm):
    text, other = compiled.encode_text(shapes.prompts), compiled.frozen_copy()
    with torch.no_grad():
        other.visual.proj.mul_(1.5)
    unit = 1 if norm == "linf" else 50

    def run(clip, n, classes, eps, step):
        start, bounds = torch.Generator().manual_seed(0), (unit * eps, unit * step)
        images, labels = shapes.images[:n] / 255, shapes.labels[:n] % classes
        return pgd(clip, images, labels, text[:classes], *bounds, 2, norm=norm, generator=start)

    run(compiled, 40, len(text), 0.02, 0.01), run(compiled, 30, len(text), 0.02, 0.02)
    plain = load_clip("mini-clip", "mini", "cpu")
    plain.visual.load_state_dict(other.visual.state_dict())
    counters.clear()
    for case in ((7, len(text), 0.02, 0.013), (23, 3, 0.03, 0.017), (5, 5, 0.01, 0.01), (40, 2, 0.015, 0.01)):
        off = (run(other, *case) - run(plain, *case)).abs() > 1e-6
        assert off.double().mean() < 1e-3  # signs of gradients near zero; a fifth with the weights of before
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("precision", ["fp32", *only_long("amp_bf16")])
def test_an_attacks_step_has_no_more_products_than_it_needs(shapes, precision):
    """A block's are queries, keys and values at once, the way out and two layers, each for values and for slopes.

    One graph serves all blocks. No operator takes weights repeated for each image, none makes gradients of weights,
    also where these are being tuned.
    """
    clip, seen = load_clip("mini-clip", "mini", "cpu", precision, compiled=True), []
    clip.model.visual.requires_grad_(True)

    def keep(graph, inputs):
        seen.append(Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if "aten" in str(node.target)))
        return graph.forward

    images, text = shapes.images[:6] / 255, clip.encode_text(shapes.prompts)
    with compiled_by(aot_autograd(fw_compiler=keep)):
        pgd(clip, images, shapes.labels[:6], text, 0.02, 0.01, 1)
    products = [operators["mm"] + operators["addmm"] for operators in seen]
    assert sorted(products) == [0, 0, 1, 1, 4, 4]  # bounds, the update; patches, a block: forwards and backwards
    for operators in seen:
        assert not operators.keys() & {"bmm", "baddbmm", "convolution", "convolution_backward"}
    assert sum(n for operators in seen for name, n in operators.items() if "scaled_dot_product" in name) == 2
    assert all(parameter.requires_grad for parameter in clip.visual.parameters())


def test_only_an_attacks_graphs_serve_all_sizes(shapes):
    """How a weight's gradient is summed over a batch must not hang on the size that was there first."""
    clip, symbolic = load_clip("mini-clip", "mini", "cpu", compiled=True), []

    def keep(graph, inputs):
        tensors = (x for x in inputs if isinstance(x, torch.Tensor))
        symbolic.append(any(isinstance(size, torch.SymInt) for x in tensors for size in x.shape))
        return graph.forward

    images, text = shapes.images[:6] / 255, clip.encode_text(shapes.prompts)
    clip.visual.requires_grad_(True)
    with compiled_by(aot_autograd(fw_compiler=keep)):
        for n in (6, 4, 6):
            clip.encode_image(images[:n]).pooled.sum().backward()
        assert symbolic == 8 * [False]  # patches and a block, forwards and backwards, for each of two sizes
        symbolic.clear()
        for n in (6, 4, 5):
            pgd(clip, images[:n], shapes.labels[:n], text, 0.02, 0.01, 1)
        assert symbolic == 6 * [True]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_code_gives_the_same_record(mini):
    data = load_dataset("shapes", "test", n=30)
    fast = load_clip("mini-clip", "mini", "cpu", compiled=True)
    assert disagreements(*(evaluate(clip, data, ATTACK, method="CLIP") for clip in (fast, mini))) <= 1


def test_autocast_is_inside_the_encoder_and_accuracy_is_read_without_it(mini, shapes, monkeypatch):
    amp, shapes = load_clip("mini-clip", "mini", "cpu", "amp_bf16"), shapes.subset(size(16, 40), 0)
    pixels = shapes.images / 255
    exact, rounded = mini.encode_image(pixels), amp.encode_image(pixels)
    assert rounded.pooled.dtype == rounded.patches.dtype == torch.float32 and fingerprint(amp) == fingerprint(mini)
    for ours, theirs in zip(rounded, exact):
        assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 3e-2  # bfloat16 has eight bits
    assert (
        torch.equal(amp.without_autocast().encode_image(pixels).pooled, exact.pooled)
        and amp.numerics.precision == "amp_bf16"
    )
    clean, plain = (evaluate(clip, shapes, None, method="CLIP") for clip in (amp, mini))
    assert clean.hits == plain.hits and clean.key != plain.key
    labels, text = shapes.labels[:4], amp.encode_text(shapes.prompts)
    assert grad_cam(amp, pixels[:4], text, labels).dtype == torch.float32
    seen = []
    logits = Clip.logits
    monkeypatch.setattr(Clip, "logits", lambda self, *a: seen.append(self.numerics.precision) or logits(self, *a))
    attacked = evaluate(amp, shapes, ATTACK, method="CLIP")
    assert seen == ["fp32"] and attacked.precision == "amp_bf16"
    seen.clear()
    worst = evaluate(amp, shapes, ATTACK, "worst", method="CLIP")  # which image is fooled is told in full precision
    assert set(seen) == {"fp32"}
    for record, protocol in ((attacked, "last"), (worst, "worst")):
        assert abs(record.correct - evaluate(mini, shapes, ATTACK, protocol, method="CLIP").correct) <= 2


def test_what_auto_means_and_bad_names(mini):
    automatic = load_clip("mini-clip", "mini", "cpu", "auto", compiled=None)
    assert automatic.numerics[1:] == ("fp32", False)
    with pytest.raises(ValueError, match="precision 'fp64' is unknown; choose one of auto, fp32, amp_bf16, fp16, bf16"):
        load_clip("mini-clip", "mini", "cpu", "fp64")
