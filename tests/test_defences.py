"""Defences at test time: their formulas, and attacks that go through them."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tgazsr_utils import defence, evaluate, find_defence, leaderboard, load_clip, open_workbook, pgd, profiles, score
from tgazsr_utils.core import defences
from tgazsr_utils.core.attacks import run_attack
from tgazsr_utils.core.defences import DEFENCES, Counted, Guard
from tgazsr_utils.core.evaluation import predictor
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring import tables
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.measure import Measurement
from tgazsr_utils.measuring.records import Record, RecordStore
from tgazsr_utils.parameters import EvaluateNotebook, SettingsError, validate
from tgazsr_utils.profiles import check_choices, default_parameters
from tgazsr_utils.runner import main
from tgazsr_utils.runtime import processes

ATTACK = AttackSettings(test_eps=3.5, test_stepsize=1, test_numsteps=2)
NOTEBOOK = "04_evaluate_16_datasets"
BALLS = {"TTC": 4 / 255, "CSR": 4 / 255, "ET3": 5 / 255, "Anti-Adversary": 4 / 255}


@pytest.fixture(scope="module")
def exact(mini):
    """The mini-CLIP in float64."""
    clip = copy.deepcopy(mini).double()
    clip.tokenizer = mini.tokenizer
    return clip


@pytest.fixture(scope="module")
def images(shapes):
    """Three, and a flat one; float64."""
    return torch.cat([shapes.images[:3].double() / 255, torch.full((1, 3, 56, 56), 0.5, dtype=torch.float64)])


def defended(name, clip, images, text, rows=None):
    noise = Noise.named(torch.arange(len(images)) if rows is None else rows, "test")
    return Guard(find_defence(name), clip, text, noise)(images)


def slow_gradient(function, x):
    """Of one image."""
    x = x.clone().requires_grad_(True)
    function(x).backward()
    return x.grad


def into(x, centre, radius):
    return torch.minimum(torch.maximum(x, centre - radius), centre + radius).clamp(0, 1)


def slow_low_pass(image):
    """By the whole plane of a shifted transform, channel by channel."""
    side = image.shape[-1]
    k = np.arange(side) - side // 2
    mask = np.exp(-(k[:, None] ** 2 + k[None] ** 2) / (2 * (40 * side / 224) ** 2))
    planes = [np.fft.ifft2(np.fft.ifftshift(np.fft.fftshift(np.fft.fft2(c)) * mask)).real for c in image.numpy()]
    return torch.from_numpy(np.stack(planes))


def slow_ttc(f, text, x, start):
    delta = into(x + start, x, 4 / 255) - x
    if torch.linalg.norm(f(x + delta) - f(x)) / torch.linalg.norm(f(x)) > 0.2:
        return x + delta
    total, weights = delta.clone(), 1.0
    for i in (1, 2):
        away = lambda d: ((f(x + d) - f(x).detach()) ** 2).sum()
        delta = into(x + delta + slow_gradient(away, delta).sign() / 255, x, 4 / 255) - x
        total, weights = total + np.exp(2 * i) * delta, weights + np.exp(2 * i)
    return x + total / weights


def slow_csr(f, text, x):
    cos = lambda a, b: (a @ b) / (a.norm() * b.norm())
    own, smooth = f(x).detach(), f(slow_low_pass(x)).detach()
    if cos(own, smooth) >= 0.85:
        return x
    gain = lambda y: cos(f(y), smooth) - cos(f(y), own)
    points = [x]
    for _ in range(3):
        points.append(into(points[-1] + 2 / 255 * slow_gradient(gain, points[-1]).sign(), x, 4 / 255))
    return max(points, key=lambda y: float(gain(y)))


def slow_et3(f, text, x):
    def energy(z):
        unit = f(z) / f(z).norm()
        return -torch.log(sum(torch.exp(100 * (unit @ t)) for t in text))

    y = x
    for _ in range(2):
        g = slow_gradient(energy, y)
        y = into(y - 2.5 * g / g.norm(), x, 5 / 255)
    return y


def slow_anti_adversary(f, text, x, scale):
    def share(z):
        unit = f(z) / f(z).norm()
        return torch.stack([torch.exp(scale * (unit @ t)) for t in text])

    top, y = int(share(x).argmax()), x
    for _ in range(2):
        g = slow_gradient(lambda z: (share(z) / share(z).sum())[top].log(), y)
        y = into(y + 2 / 255 * g.sign(), x, 4 / 255)
    return y


@pytest.mark.parametrize("name", ["TTC", "CSR", "ET3", "Anti-Adversary", "low-pass"])
def test_a_defence_is_its_formula(name, exact, shapes, images, monkeypatch):
    text = exact.encode_text(shapes.prompts).double()
    found = defended(name, exact, images, text)
    f = lambda x: exact.encode_image(x[None]).pooled[0]
    if name in ("TTC", "CSR"):  # seen from near the first image, that one alone is moved far by noise and a low-pass
        encode, here = exact.encode_image, 0.98 * f(images[0]).detach()
        moved = lambda pixels: (tokens := encode(pixels))._replace(pooled=tokens.pooled - here)
        monkeypatch.setattr(exact, "encode_image", moved)
        found = defended(name, exact, images, text)
    noise = Noise.named(torch.arange(len(images)), "test")
    noise = noise._replace(seed=int(defences.digest(noise.seed, 0), 16))
    starts = 4 / 255 * (2 * noise.uniform(3, 56, 56).double() - 1)
    slow = {
        "TTC": lambda i: slow_ttc(f, text, images[i], starts[i]),
        "CSR": lambda i: slow_csr(f, text, images[i]),
        "ET3": lambda i: slow_et3(f, text, images[i]),
        "Anti-Adversary": lambda i: slow_anti_adversary(f, text, images[i], exact.model.logit_scale.exp().item()),
        "low-pass": lambda i: slow_low_pass(images[i]),
    }[name]
    for i, image in enumerate(found):
        off = (image - slow(i).detach()).abs() > 1e-6
        assert off.double().mean() < 1e-3, (name, i)  # signs of gradients that are zero but for rounding
    changed = (found - images).abs().amax((1, 2, 3)) > 1e-9
    if name == "CSR":
        assert changed[0] and not changed.all()  # its gate is seen from both sides
    elif name == "TTC":
        random = (found - into(images + starts, images, 4 / 255)).abs().amax((1, 2, 3)) < 1e-6
        assert random[0] and not random.all()  # so is this one
    else:
        assert changed.sum() >= len(images) - 1  # a low-pass leaves what is flat


@pytest.mark.parametrize("name", list(BALLS) + ["low-pass"])
def test_the_ball_and_the_pixel_range_hold_exactly(name, mini, shapes):
    x = shapes.images[:12].float() / 255
    found = defended(name, mini, x, mini.encode_text(shapes.prompts))
    assert found.min() >= 0 and found.max() <= 1 and found.dtype == torch.float32
    if name in BALLS:
        assert ((found.double() - x.double()).abs() <= BALLS[name]).all()


@pytest.mark.parametrize("name", list(DEFENCES))
def test_an_image_is_defended_and_attacked_alike_in_every_batch(name, mini, shapes):
    data, found = shapes.subset(6), []
    for chunks in (6, torch.arange(6).flip(0).split(4)):
        attacked, classes = torch.zeros(6, 3, 56, 56), torch.zeros(6, dtype=torch.long)
        for part in map(predictor(mini, data, ATTACK, defence=DEFENCES[name]), data.batches(chunks)):
            attacked[part.batch.rows], classes[part.batch.rows] = part.attacked, part.classes
        found.append((attacked, classes))
    # The numbers drawn are the same; sums of another order turn few signs of gradients that are nearly zero.
    assert ((found[0][0] - found[1][0]).abs() > 1e-6).float().mean() < 0.05
    assert (found[0][1] != found[1][1]).sum() <= 1


def test_other_draws_answer_than_those_the_attack_has_seen(mini, shapes):
    x, text, rows = shapes.images[:4].float() / 255, mini.encode_text(shapes.prompts), torch.arange(4)
    guard = Guard(DEFENCES["TTC"], mini, text, Noise.named(rows, "a"), 4)
    first, *others, own = guard.draws(x)
    assert own is x and len(others) == 3
    assert not any(torch.equal(first, other) for other in others)
    again = Guard(DEFENCES["TTC"], mini, text, Noise.named(rows, "a"))
    assert torch.equal(again(x), first)
    part = Guard(DEFENCES["TTC"], mini, text, Noise.named(rows, "a")).of(torch.tensor([2, 0]))
    assert torch.allclose(part(x[[2, 0]]), first[[2, 0]], atol=2.1 / 255)


def test_the_gradient_goes_straight_through_or_is_the_defences_own(mini, shapes):
    x, text = shapes.images[:4].float() / 255, mini.encode_text(shapes.prompts)
    loss = lambda seen: F.cross_entropy(mini.logits(seen, text), shapes.labels[:4], reduction="sum")
    for name in ("ET3", "low-pass"):
        guard = Guard(DEFENCES[name], mini, text, Noise.named(torch.arange(4), "a"))
        own = x.clone().requires_grad_(True)
        seen = guard(own)
        (found,) = torch.autograd.grad(loss(seen), own)
        behind = seen.detach().requires_grad_(True)
        (at_it,) = torch.autograd.grad(loss(behind), behind)
        scale = 3 * at_it.abs().max()
        smooth = defences.low_pass(mini, at_it / scale + 0.5, text) - 0.5  # symmetric, so its own transpose
        assert torch.allclose(found / scale, at_it / scale if name == "ET3" else smooth, atol=1e-4)


def test_one_step_of_an_aware_attack_follows_the_mean_gradient_behind_the_defence(mini, shapes):
    x, labels, text = shapes.images[:4].float() / 255, shapes.labels[:4], mini.encode_text(shapes.prompts)
    guard = lambda: Guard(DEFENCES["TTC"], mini, text, Noise.named(torch.arange(4), "d"), 4)
    arguments, noise = (mini, x, labels, text, 3.5 / 255, 1 / 255), Noise.named(torch.arange(4), "s")
    start = pgd(*arguments, 0, generator=noise).requires_grad_(True)
    loss = sum(F.cross_entropy(mini.logits(seen, text), labels, reduction="sum") for seen in guard().draws(start))
    (gradient,) = torch.autograd.grad(loss, start)
    expected = into(start.detach() + gradient.sign() / 255, x, 3.5 / 255)
    found = pgd(*arguments, 1, generator=noise, guard=guard())
    clear = gradient.abs() > 0.03 * gradient.abs().mean((1, 2, 3), keepdim=True)  # rounding decides the sign of others
    assert clear.float().mean() > 0.9 and ((found - expected)[clear].abs() > 1e-6).float().mean() < 1e-3
    assert ((found - pgd(*arguments, 1, generator=noise))[clear].abs() > 1e-6).float().mean() > 0.05


def test_under_worst_what_the_defended_model_gets_wrong_is_left_as_it_is(mini, shapes):
    x, text = shapes.images[:6].float() / 255, mini.encode_text(shapes.prompts)
    guard = lambda: Guard(DEFENCES["TTC"], mini, text, Noise.named(torch.arange(6), "d"), 2)
    labels = guard().logits(x, text).argmax(1)
    labels[1] = (labels[1] + 1) % len(text)
    cw = ATTACK.model_copy(update={"attack": "cw"})
    found = run_attack(mini, x, labels, text, cw, "worst", Noise.named(torch.arange(6), "s"), guard())
    assert ((found.double() - x.double()).abs() <= 3.5 / 255).all()
    assert [torch.equal(*pair) for pair in zip(found, x)] == [i == 1 for i in range(6)]


def test_passes_are_counted_where_they_are_made(mini, shapes, passes):
    x, text = shapes.images[:6].float() / 255, mini.encode_text(shapes.prompts)
    for name, expected in {"TTC": (4, 2), "ET3": (3, 2), "Anti-Adversary": (4, 2), "low-pass": (1, 0)}.items():
        counted, before = Counted.of(mini), sum(n for n, _ in passes)
        Guard(DEFENCES[name], counted, text, Noise.named(torch.arange(6), "a")).logits(x, text)
        assert (counted.forwards / 6, counted.backwards / 6) == expected
        assert sum(n for n, _ in passes) - before == counted.forwards
    counted = Counted.of(mini)
    moved = defences.csr(counted, x, text)
    assert 12 <= counted.forwards <= 36 and counted.backwards == 3 * (moved != x).flatten(1).any(1).sum()


@pytest.mark.parametrize("protocol", ["last", "worst"])
def test_an_attack_made_on_another_model_knows_the_defence_before_that_one(mini, protocol):
    """So its images are those of an aware attack on the other model itself, whoever reads them."""
    data, other = load_dataset("shapes", "test", n=6), load_clip("mini-clip", "mini-tga-zsr", "cpu")
    behind = {"protocol": protocol, "defence": DEFENCES["ET3"], "aware": True}
    (batch,) = data.batches(6)
    made = predictor(mini, data, ATTACK, source=other, **behind)(batch)
    itself = predictor(other, data, ATTACK, **behind)(batch)
    assert torch.equal(made.attacked, itself.attacked) and not torch.equal(made.attacked, made.batch.images)


@pytest.fixture(scope="module")
def measured(mini, tmp_path_factory):
    sets = [load_dataset(key, "test", n=6) for key in ("shapes", "colours")]
    bench, found = Bench(RecordStore(tmp_path_factory.mktemp("records"))), []
    for name in (None, "TTC", "low-pass"):
        found += bench.measure(mini, sets, ATTACK, method="CLIP", defence=name)
    return found


def test_each_defence_has_three_records_a_set_that_say_so(mini, measured):
    kinds = [(r.dataset, r.defence, r.attack, r.aware) for r in measured]
    assert len(set(kinds)) == len(kinds) == 2 * (2 + 3 + 3) == len({r.key for r in measured})
    ttc = [r for r in measured if r.defence == "TTC" and r.dataset == "shapes"]
    data = load_dataset("shapes", "test", n=6)
    again = evaluate(mini, data, ATTACK, method="CLIP", defence="TTC")
    assert (again.key, again.hits, again.aware) == (ttc[2].key, ttc[2].hits, True)
    assert evaluate(mini, data, ATTACK, method="CLIP", defence="TTC", aware=False).key == ttc[1].key
    assert [r.key for r in score(mini, [data], ATTACK, defence="TTC")] == [ttc[0].key, ttc[2].key]
    assert {(r.forwards, r.backwards) for r in ttc} == {(4.0, 2.0)}
    plain = {
        k: v for k, v in measured[0].model_dump().items() if k not in ("defence", "aware", "forwards", "backwards")
    }
    assert Record(**plain) == measured[0]  # as records were before there were defences


def test_processes_share_the_aware_attacks_evenly(mini, tmp_path, monkeypatch):
    """Each is many times the work of the others, and there is one a set: clean and unaware together, aware in turn."""
    shares = []
    monkeypatch.setattr(processes, "own_part", lambda jobs, costs: shares.append(costs) or [])
    sets = [load_dataset(key, "test", n=2) for key in ("shapes", "colours")]
    with pytest.raises(RuntimeError, match="6 measurements of CLIP were made by no process"):
        Bench(RecordStore(tmp_path)).measure(mini, sets, ATTACK, method="CLIP", defence="TTC")
    (others, aware), second = shares[0][:2], shares[0][2:]
    assert aware > 3 * others > 3 * len(sets[0]) and second == [others, aware]


def test_the_table_shows_no_unaware_number_without_the_aware_one(measured):
    table = tables.defences(measured)
    assert list(table.index) == [("CLIP", "none"), ("CLIP", "TTC"), ("CLIP", "low-pass")]
    of = lambda name, attack, aware: [
        r.accuracy for r in measured if (r.defence, r.attack, r.aware) == (name, attack, aware)
    ]
    row = table.loc["CLIP", "TTC"]
    assert row.clean == pytest.approx(np.mean(of("TTC", "none", False)))
    assert row.unaware == pytest.approx(np.mean(of("TTC", "pgd-2", False)))
    right = [
        [tables.bits(r) for r in measured if (r.defence, r.attack, r.aware) == ("TTC", "pgd-2", a)]
        for a in (False, True)
    ]
    assert row.aware == pytest.approx(100 * np.mean([(a & b).mean() for a, b in zip(*right)]))  # who knows may use both
    plain = table.loc["CLIP", "none"]
    assert plain.unaware == plain.aware == leaderboard(measured).robust.item() and plain.forwards == 1
    assert set(table.world) == {"mini-world"} and row.aware_ci > 0
    alone = tables.defences([r for r in measured if not r.aware]).loc["CLIP", "TTC"]
    assert np.isnan(alone.unaware) and np.isnan(alone.aware) and alone.clean == row.clean
    shown = tables.readable(tables.defences([r for r in measured if not r.aware]))
    assert shown.loc["CLIP", "TTC"].unaware == "not counted"
    other = [r.model_copy(update={"eps_255": 8.0}) if r.defence == "TTC" else r for r in measured]
    with pytest.raises(ValueError, match="differ in eps_255"):
        tables.defences(other)


def test_every_other_table_ignores_records_behind_a_defence(measured):
    plain = [r for r in measured if not r.defence]
    for table in (leaderboard, tables.differences, lambda records: tables.compare(records, records)):
        assert table(measured).equals(table(plain))


@pytest.mark.long
def test_ttc_holds_no_better_against_an_attack_that_goes_through_it(mini):
    """At notebook 04's setting."""
    data, attack = load_dataset("shapes", "test", n=16), ATTACK.model_copy(update={"test_numsteps": 10})
    unaware, aware = (evaluate(mini, data, attack, defence="TTC", aware=known) for known in (False, True))
    assert aware.correct <= unaware.correct


def test_an_unknown_defence_gets_the_closest_name_and_a_defence_needs_an_attack_that_goes_through(tmp_path, capsys):
    for name, hint in {"ttc": "TTC", "Low Pass": "low-pass", "AntiAdversary": "Anti-Adversary"}.items():
        with pytest.raises(ValueError, match=f"defence '{name}' is unknown: did you mean {hint}. there are: TTC, "):
            find_defence(name)
    given = ["mini", "04", "-p", "methods", "[]", "-p", "output", str(tmp_path / "out"), "-p", "defences"]
    for value, message in {
        "TCC": "04_.*: defence 'TCC' is unknown: did you mean TTC",
        "[TTC, TTC]": "parameter defences = .*an entry is there twice",
    }.items():
        assert main([*given, value]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(message, error), error
    values = default_parameters(NOTEBOOK) | {"defences": ["TTC"], "attack": "autoattack"}
    with pytest.raises(SettingsError, match="'apgd' does not go through a defence.*choose 'pgd' or 'cw'"):
        validate(EvaluateNotebook, values)
    square = AttackSettings(attack="autoattack", test_eps=1, test_stepsize=1, test_numsteps=1)
    with pytest.raises(ValueError, match="does not go through"):
        Measurement(None, None, square, defence=DEFENCES["TTC"])
    assert validate(EvaluateNotebook, values | {"attack": "cw", "defences": "TTC, low-pass"}).defences[1] == "low-pass"


def test_a_defence_of_ones_own_is_one_function(mini, shapes, monkeypatch):
    monkeypatch.setattr(defences, "DEFENCES", dict(DEFENCES))

    @defence("flip", differentiable=True)
    def flip(clip, images, text):
        return images.flip(3)

    data = shapes.subset(10)
    one = evaluate(mini, data, ATTACK, defence="flip")
    mirrored = load_dataset("shapes", "test", n=40).subset(10)
    flipped = mirrored.__class__(**{**vars(mirrored), "images": mirrored.images.flip(3)})
    assert evaluate(mini, data, defence="flip").hits == evaluate(mini, flipped).hits
    assert (one.defence, one.aware, one.forwards, one.backwards) == ("flip", True, 1.0, 0.0)
    own = lambda name: {"own"} if name == NOTEBOOK else set()
    monkeypatch.setattr(profiles, "registered_in", own)
    check_choices(NOTEBOOK, default_parameters(NOTEBOOK) | {"defences": ["own"], "methods": []})


def test_notebook_04_has_a_table_only_where_defences_are_asked_for(tmp_path, capsys):
    from test_runner import run_cells

    small = {"methods": [], "testdata": ["shapes"], "test_images": 4, "test_numsteps": 1, "check_images": 0}
    for names in ([], ["TTC", "low-pass"]):
        values = (
            default_parameters(NOTEBOOK)
            | small
            | {"defences": names, "output": str(tmp_path / "out" / str(len(names)))}
        )
        run_cells(NOTEBOOK, values)
        table = tmp_path / "out" / str(len(names)) / "tables" / "defences.csv"
        assert table.exists() == bool(names)
    found = table.read_text().splitlines()
    assert found[0].startswith("method,defence,clean,clean_ci,unaware,unaware_ci,aware,aware_ci,forwards,backwards")
    assert len(found) == 1 + 3
    open_workbook(NOTEBOOK, values)
