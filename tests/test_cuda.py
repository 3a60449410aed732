"""What only a CUDA device can show: that numbers there are those of the CPU, the same each time, and fit its memory."""

import math

import pytest
import torch
from conftest import train_settings

from tgazsr_utils.core import attacks, encoder
from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.images import ball
from tgazsr_utils.core.objectives import find_objective
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.core.training import optimizer_of, steps
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring import measure
from tgazsr_utils.measuring.measure import Measurement, answer, batch_that_fits, evaluate
from tgazsr_utils.runtime.devices import cuda_elsewhere, device_name, pick_device
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.weights import load_clip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

ATTACK = AttackSettings(test_eps=3, test_stepsize=1, test_numsteps=5)
SETTINGS = train_settings(batch_size=16, lr=1e-4, train_numsteps=2)


@pytest.fixture(scope="module")
def exact():
    """The mini-CLIP on the GPU, as it computes on the CPU: fp32, not compiled."""
    return load_clip("mini-clip", "mini", "cuda", "fp32", compiled=False)


@pytest.fixture(scope="module")
def fast():
    """As "auto" is on a GPU: compiled, under bfloat16 autocast."""
    return load_clip("mini-clip", "mini", "cuda", "auto", compiled=None)


@pytest.fixture(scope="module")
def letters():
    return load_dataset("letters", "test", n=100)


def test_auto_takes_it_and_its_name_needs_no_context_here(fast):
    assert pick_device("auto").type == "cuda" and device_name("auto") == torch.cuda.get_device_name()
    capable = torch.cuda.get_device_capability() >= (8, 0)
    assert cuda_elsewhere() == (capable, True)
    assert fast.numerics == ("cuda", "amp_bf16" if capable else "fp32", True)


def test_random_starts_are_those_of_the_cpu():
    rows = torch.tensor([0, 3, 2**40])
    here, there = (Noise(2**47 + 11, rows.to(device)).uniform(3, 56, 56).cpu() for device in ("cpu", "cuda"))
    assert torch.equal(here, there)


def test_compiled_bounds_are_as_tight_as_others(fast):
    images, eps = torch.rand(9, 3, 56, 56), torch.tensor(3 / 255, dtype=torch.float64)
    for found, expected in zip(fast.run(ball, images.cuda(), eps), ball(images, 3 / 255)):
        assert torch.equal(found.cpu(), expected)


def test_fp32_tokens_and_gradients_are_those_of_the_cpu(mini, exact, letters):
    pixels, found = letters.images[:20] / 255, []
    for clip in (mini, exact):
        x = pixels.clone().to(clip.device).requires_grad_(True)
        tokens = clip.encode_image(x)
        (tokens.pooled.square().sum() + tokens.patches[:, ::3].sin().sum()).backward()
        found.append([*tokens, x.grad])
    for ours, theirs in zip(*reversed(found)):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_the_attack_is_that_of_the_cpu(mini, exact, letters):
    """But for pixels whose gradient's sign is a matter of rounding."""
    made = []
    for clip in (mini, exact):
        images, labels = (letters.images / 255).to(clip.device), letters.labels.to(clip.device)
        noise = Noise.named(torch.arange(100, device=clip.device), "a")
        text = clip.encode_text(letters.prompts)
        made.append(pgd(clip, images, labels, text, 3 / 255, 1 / 255, 5, generator=noise).cpu())
    assert (made[0] - made[1]).abs().gt(1e-6).float().mean() < 0.02
    assert abs(evaluate(mini, letters, ATTACK).correct - evaluate(exact, letters, ATTACK).correct) <= 1
    assert abs(evaluate(mini, letters).correct - evaluate(exact, letters).correct) <= 1


def test_same_seed_same_weights_and_records(fast, letters, tmp_path):
    """Also where kernels are made anew."""
    train, found = load_dataset("shapes", "train", n=40), []  # the last batch is short
    for time in range(2):
        torch._dynamo.reset()
        encoder._compile.cache_clear()
        tuned = finetune(fast, train, "TGA-ZSR", SETTINGS, tmp_path / str(time)).clip
        record = evaluate(tuned, letters, ATTACK)
        found.append((fingerprint(tuned), record.hits, record.pixels))
    assert found[0] == found[1]


def test_a_batchs_size_changes_no_answer(fast, letters, monkeypatch):
    answers = []
    for size in (100, 64, 7):
        monkeypatch.setattr(measure, "batch_that_fits", lambda clip, size=size: size)
        answers.append(answer([Measurement(fast, letters, ATTACK)], range(100))[0][0].classes)
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("model", ["fast", "exact"])
def test_rounds_that_are_left_out_of_an_attack_change_nothing(model, letters, monkeypatch, request):
    clip, made = request.getfixturevalue(model), []
    images, labels = letters.images[:8].cuda() / 255, letters.labels[:8].cuda()
    text, rows = clip.encode_text(letters.prompts), torch.arange(8, device="cuda")
    for rounds in (attacks.ROUND, 1000):
        monkeypatch.setattr(attacks, "ROUND", rounds)
        made.append(pgd(clip, images, labels, text, 1 / 255, 1 / 255, 100, generator=Noise.named(rows, "start")))
    assert torch.equal(*made)


def test_the_batch_that_is_chosen_fits(fast, letters):
    chosen = batch_that_fits(fast)
    assert chosen == measure.LARGEST_BATCH["cuda"] or math.log2(chosen).is_integer()
    images = torch.rand(chosen, 3, 56, 56, device="cuda")
    labels, text = torch.zeros(chosen, dtype=torch.int64, device="cuda"), fast.encode_text(letters.prompts)
    pgd(fast, images, labels, text, 0.01, 0.01, 2)


def test_where_memory_runs_out_the_batch_is_halved(exact, letters, monkeypatch, capsys):
    whole = evaluate(exact, letters, ATTACK)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_allocated() + 24 * int(measure._bytes_an_image(exact))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    monkeypatch.setattr(measure, "batch_that_fits", lambda clip: 128)
    monkeypatch.setattr(measure, "_fitted", {})
    torch.cuda.set_per_process_memory_fraction(min(1.0, (room + 2**26) / total))
    try:
        found = evaluate(exact, letters, ATTACK)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory ran out; going on with 64 images at once" in capsys.readouterr().out
    assert found.batch < 128 and abs(found.correct - whole.correct) <= 1


@pytest.mark.parametrize("method", ["TGA-ZSR", "Comp-TGA", "PMG-AFT", "FARE", "UCAT", "AdvFLYP"])
def test_a_step_waits_for_nothing(fast, method):
    """PyTorch itself stops whatever waits for the GPU, which would be idle until the next step is prepared."""
    objective, train = find_objective(method), load_dataset("shapes", "train", n=96)
    settings = objective.with_preset(SETTINGS)
    tuned = fast.frozen_copy()
    running = steps(tuned, fast, train, objective, settings, optimizer_of(tuned, settings))
    for _ in range(2):
        next(running)  # compiles, and encodes the prompts
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            update = next(running)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert update.number == 4 and math.isfinite(update.values()["loss"])
