"""As released, number by number: what the codes of TGA-ZSR, TeCoA, PMG-AFT and RobustVLM computed on our shipped model.

``golden/README.md`` says how these numbers were made and what each tensor is. Images come with them, so that only the
weights must be the shipped ones.
"""

import csv
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import train_settings
from safetensors import safe_open

from tgazsr_utils.core.attacks import cw, pgd
from tgazsr_utils.core.attention import complementary_attention, grad_cam, text_guided_attention
from tgazsr_utils.core.objectives import Step, find_objective, negated, weighted_sum
from tgazsr_utils.core.training import optimizer_of, trainable, warmup_cosine
from tgazsr_utils.datasets.layouts import _raw_name
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.datasets.published_sets import DATASETS
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.weights import load_clip

FOLDER = Path(__file__).parent / "golden"
with safe_open(FOLDER / "released.safetensors", "pt") as _file:
    GOLD = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118  (not a dict)
    ABOUT = _file.metadata()
PROMPTS, NEGATED = tuple(json.loads(ABOUT["prompts"])), json.loads(ABOUT["negated"])
X, Y, PGD2 = GOLD["images"].float() / 255, GOLD["labels"], GOLD["pgd2.images"]
EPS, STEP = 3.5 / 255, 1 / 255
ROWS = list(csv.DictReader((FOLDER / "prompts.csv").open(encoding="utf-8")))


def relative(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def pixels_off(a, b):
    """Share of the pixel values that are off by more than 1e-6."""
    return (a - b).abs().gt(1e-6).double().mean().item()


@pytest.fixture
def pixels_surely_off(monkeypatch):
    """(attack, stored images) -> share of the pixels that differ although no step's gradient was near zero there.

    A sign step makes a whole step of a gradient that is nothing but rounding, which depends on the CPU. "Near zero" is
    3 % of the image's mean |gradient|; that leaves eight pixels of ten.
    """
    seen, grad = [], torch.autograd.grad

    def record(*arguments, **options):
        (gradient,) = grad(*arguments, **options)
        seen.append(gradient.abs() / gradient.abs().flatten(1).mean(1)[:, None, None, None])
        return (gradient,)

    def compare(attack, stored):
        with monkeypatch.context() as within:
            within.setattr(torch.autograd, "grad", record)
            made = attack()
        clear = torch.stack(seen).amin(0) > 0.03
        assert clear.double().mean() > 0.8
        return pixels_off(made[clear], stored[clear])

    return compare


def generator():
    return torch.Generator().manual_seed(json.loads(ABOUT["seed"]))  # draws the stored noise


@pytest.fixture(scope="module")
def f0(mini):
    assert fingerprint(mini) == ABOUT["mini"], "other weights than the golden numbers were made with"
    return mini


@pytest.fixture(scope="module")
def f():
    clip = load_clip("mini-clip", "mini-tga-zsr", "cpu")
    assert fingerprint(clip) == ABOUT["mini_tga_zsr"], "other weights than the golden numbers were made with"
    return clip


@pytest.fixture(scope="module")
def text(f0):
    return f0.encode_text(PROMPTS)


def differentiated(f, f0, method, attacked, weights=None, **changes):
    """(unweighted terms and their sum, the model with its gradients) of a method on given attacked images."""
    tuned = f.frozen_copy()
    trainable(tuned.visual, 0)
    step = Step(tuned, f0, X, Y, PROMPTS, adversarial=attacked)
    terms = find_objective(method).terms(step, train_settings(**changes))
    terms = [term._replace(weight=weight) for term, weight in zip(terms, weights or [t.weight for t in terms])]
    total = weighted_sum(terms)
    total.backward()
    return [*(term.value.item() for term in terms), total.item()], tuned


def check_gradients(name, tuned):
    gradients = {key: p.grad for key, p in tuned.visual.named_parameters()}
    some = json.loads(ABOUT["gradient_tensors"])[1:]
    norms = [value.double().norm() for value in gradients.values()]
    norms = [torch.stack(norms).norm().item(), *(gradients[key].double().norm().item() for key in some)]
    assert norms == pytest.approx(GOLD[f"{name}.gradient_norms"].tolist(), rel=1e-3)
    assert relative(gradients["ln_post.weight"], GOLD[f"{name}.gradient_ln_post"]) < 1e-3


def test_images_prompts_and_their_embeddings(f0, f, text):
    today = load_dataset("shapes", "test", n=8)
    assert torch.equal(today.labels, Y) and today.prompts == PROMPTS
    rounded = (today.images.int() - GOLD["images"].int()).abs()  # processors round a few pixels otherwise
    assert rounded.max() <= 1 and rounded.double().mean() < 1e-3
    assert [negated(prompt) for prompt in PROMPTS] == NEGATED
    assert relative(text, GOLD["text"]) < 1e-5 and relative(f0.encode_text(NEGATED), GOLD["not_text"]) < 1e-5
    assert f.model.logit_scale.exp().item() == pytest.approx(GOLD["logit_scale"].item(), rel=1e-6)


@pytest.mark.parametrize("name", ["f0", "f"])
def test_tokens_logits_and_maps(name, text, request):
    clip = request.getfixturevalue(name)
    not_text = clip.encode_text(NEGATED)
    with torch.no_grad():
        tokens = clip.encode_image(X)
        assert relative(tokens.pooled, GOLD[f"{name}.class_tokens"]) < 1e-5
        assert relative(tokens.patches, GOLD[f"{name}.patch_tokens"]) < 1e-5
        assert relative(clip.logits(X, text), GOLD[f"{name}.logits"]) < 1e-5
        assert relative(text_guided_attention(tokens, text[Y], size=56), GOLD[f"{name}.attention"]) < 1e-4
        complementary = complementary_attention(tokens, text[Y], not_text[Y], size=56)
    assert relative(complementary, GOLD[f"{name}.complementary"]) < 1e-4  # 0.16 if multiplied before the resize


@pytest.mark.parametrize(
    ("name", "attack", "step", "steps"), [("pgd2", pgd, EPS, 2), ("pgd10", pgd, STEP, 10), ("cw10", cw, STEP, 10)]
)
def test_attacks_to_the_pixel(f, text, name, attack, step, steps, pixels_surely_off):
    stored = GOLD[f"{name}.images"]
    n = len(stored)
    drawn = EPS * (2 * torch.rand(X.shape, generator=generator()) - 1)
    torch.testing.assert_close(drawn, GOLD["noise"], rtol=0, atol=1e-8)
    run = lambda: attack(f, X[:n], Y[:n], text, EPS, step, steps, generator=generator())
    assert pixels_surely_off(run, stored) < 1e-3  # 8 % if one is taken for the other
    with torch.no_grad():
        assert relative(f.logits(stored, text), GOLD[f"{name}.logits"]) < 1e-5


def test_attack_of_pmg_aft_sees_bare_cosines(f, f0, text, pixels_surely_off):
    loss = find_objective("PMG-AFT").attack(Step(f, f0, X, Y, PROMPTS))
    run = lambda: pgd(f, X, Y, text, EPS, EPS, 2, loss=loss, generator=generator())
    assert pixels_surely_off(run, GOLD["pmg.images"]) < 1e-3  # 26 % with the temperature


@pytest.mark.parametrize(("name", "start", "other"), [("fare", "uncut", "fare_cut"), ("fare_cut", "cut", "fare")])
def test_attack_of_fare_with_either_start(f, f0, text, name, start, other, pixels_surely_off):
    loss = find_objective("FARE").attack(Step(f, f0, X, Y, PROMPTS))
    run = lambda: pgd(f, X, Y, text, EPS, STEP, 10, loss=loss, start=start, generator=generator())
    assert pixels_surely_off(run, GOLD[f"{name}.images"]) < 1e-3  # 2.4 % with nine steps
    off, off_other = (pixels_off(run(), GOLD[f"{stored}.images"]) for stored in (name, other))
    assert off < off_other / 2
    assert find_objective("FARE-RobustVLM").preset["train_start"] == "uncut"


# name of the tensors -> method, attacked images, settings that differ, tolerance of the terms
LOSSES = {
    "tga.l2": ("TGA-ZSR", "pgd2", {}, 1e-4),
    "tga.l1": ("TGA-ZSR", "pgd2", {"Distance_metric": "l1"}, 1e-4),
    "tga.cos": ("TGA-ZSR", "pgd2", {"Distance_metric": "cos"}, 1e-3),  # 1 - cosine loses digits
    "comp.l2": ("Comp-TGA", "pgd2", {"Alpha": 0.10, "Beta": 0.07}, 1e-4),
    "visual.l2": ("Vision-based", "pgd2", {"distance_size": 56}, 1e-3),  # its maps are of the images' size
    "pmg": ("PMG-AFT", "pmg", {}, 1e-4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_terms_and_gradients_of_losses(f, f0, name):
    method, attacked, changes, tolerance = LOSSES[name]
    terms, tuned = differentiated(f, f0, method, GOLD[f"{attacked}.images"], **changes)
    assert terms == pytest.approx(GOLD[f"{name}.terms"].tolist(), rel=tolerance)
    check_gradients(name, tuned)


def test_terms_and_gradients_of_pmg_aft_with_its_temperature(f, f0):
    """Our PMG-AFT-scaled averages over the batch what was summed there."""
    terms, tuned = differentiated(f, f0, "PMG-AFT-scaled", PGD2, weights=(1, len(X), len(X)))
    summed = [terms[0], len(X) * terms[1], len(X) * terms[2], terms[3]]
    assert summed == pytest.approx(GOLD["pmg_temperature.terms"].tolist(), rel=1e-4)
    check_gradients("pmg_temperature", tuned)


@pytest.mark.parametrize(
    ("name", "method", "attacked"),
    [
        ("tecoa", "TeCoA", PGD2),
        ("ft_clean", "FT-Clean", X),
        ("ft_adv", "FT-Adv.", PGD2),
        ("fare", "FARE-RobustVLM", GOLD["fare.images"]),
        ("fare_cut", "FARE", GOLD["fare_cut.images"]),
    ],
)
def test_losses_of_one_term(f, f0, name, method, attacked):
    terms, tuned = differentiated(f, f0, method, attacked)
    assert terms[-1] == pytest.approx(GOLD[f"{name}.loss"].item(), rel=1e-4)
    check_gradients(name, tuned)


@pytest.mark.parametrize(("side", "images"), [("clean", X), ("pgd2", PGD2)])
def test_grad_cam_of_the_best_text_of_the_batch_scaled_after_the_resize(f, text, side, images):
    with torch.no_grad():
        best = Y[f.logits(images, text[Y]).argmax(1)]
    assert torch.equal(best, GOLD[f"gradcam.{side}.target"])
    assert relative(grad_cam(f, images, text, Y, size=56), GOLD[f"gradcam.{side}"]) < 1e-3
    assert relative(grad_cam(f, images, text, Y, "true", size=56), GOLD[f"gradcam.{side}.true"]) < 1e-3
    before = F.interpolate(grad_cam(f, images, text, Y)[:, None], size=56, mode="bilinear")[:, 0]
    assert relative(before, GOLD[f"gradcam.{side}"]) > 0.01  # scaled before the resize


@pytest.mark.parametrize(("warmup", "total"), [(1000, 7820), (20, 100)])
def test_learning_rates(warmup, total):
    steps = GOLD[f"lr.{warmup}_{total}.steps"].tolist()
    found = [1e-4 * warmup_cosine(step, warmup, total) for step in steps]
    assert found == pytest.approx(GOLD[f"lr.{warmup}_{total}"].tolist(), rel=1e-6)


def test_one_step_of_sgd(f, f0):
    _, tuned = differentiated(f, f0, "TGA-ZSR", PGD2)
    optimizer = optimizer_of(tuned, find_objective("TGA-ZSR").with_preset(train_settings()))
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()
    before = dict(f.visual.named_parameters())
    change = {name: p.detach().double() - before[name].double() for name, p in tuned.visual.named_parameters()}
    norms = [torch.stack([value.norm() for value in change.values()]).norm().item()]
    norms += [change[name].norm().item() for name in json.loads(ABOUT["gradient_tensors"])[1:]]
    assert norms == pytest.approx(GOLD["sgd.change_norms"].tolist(), rel=1e-3)
    assert relative(change["ln_post.weight"], GOLD["sgd.change_ln_post"]) < 1e-3


def test_last_num_ft_counts_tensors_in_openai_s_order(f):
    released = json.loads(ABOUT["parameters_released"])
    names = {id(p): name for name, p in f.visual.named_parameters()}
    visual = f.visual
    assert len(released) == 68
    for k in range(1, 69):
        assert [names[id(p)] for p in trainable(visual, k)] == released[-k:]
    visual.requires_grad_(False)


@pytest.mark.parametrize("key", DATASETS)
def test_every_prompt_as_tokens(f, key):
    """Strings may differ in what the tokenizer drops, such as the space at the end of two flowers."""
    spec, rows = DATASETS[key], [row for row in ROWS if row["set"] == key]
    raw = [_raw_name(row["raw"]) if key in ("ImageNet", "tinyImageNet") else row["raw"] for row in rows]
    ours = [spec.prompt.replace("{}", spec.class_name(name)) for name in raw]
    assert len(rows) == spec.classes
    wrong = [
        (row["prompt"], own)
        for row, own in zip(rows, ours)
        if row["prompt"] != own and not torch.equal(f.tokenizer([row["prompt"]]), f.tokenizer([own]))
    ]
    assert not wrong


def test_flowers_as_torchvision_names_them(f):
    spec, names = DATASETS["flowers102"], torchvision.datasets.Flowers102.classes
    prompts = [spec.prompt.replace("{}", spec.class_name(name)) for name in names]
    assert torch.equal(f.tokenizer(prompts), f.tokenizer([row["prompt"] for row in ROWS if row["set"] == "flowers102"]))
