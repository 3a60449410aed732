"""The benchmarks' command, on the mini-CLIP; their numbers for ViT-B/32 are kept in data/reference/benchmarks."""

import json
import subprocess
import sys

import pytest
import torch

from tgazsr_utils.paths import ROOT
from tgazsr_utils.runtime.weights import load_clip

sys.path.insert(0, str(ROOT / "benchmarks"))

import busy  # noqa: E402
import released  # noqa: E402
import repeats  # noqa: E402
import run  # noqa: E402


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the command measures and prints."""
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "benchmarks/run.py", "--arch", "mini-clip", "--device", "cpu", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "benchmarks.json").read_text()), done.stdout, list(run.MEASUREMENTS)


@pytest.mark.long
def test_the_command_measures_and_names_the_machine(found):
    numbers, printed, names = found
    assert set(numbers) == {"machine", "arch", "speed_up", *names}
    assert numbers["machine"]["torch"] == torch.__version__ and "threads" in numbers["machine"]["device"]
    assert all(name in printed for name in names)
    assert f"speed-up of a step: {numbers['speed_up']:.2f}" in printed
    assert numbers["speed_up"] == numbers["released"]["seconds"] / numbers["step"]["seconds"]
    assert numbers["step"]["utilisation"] > 0 and all(numbers[name]["peak_memory_gib"] > 0 for name in names)


def test_what_needs_no_process_of_its_own():
    assert run.measured("attack", "mini-clip", "cpu")["images_a_second"] > 0
    training = run.measured("training", "mini-clip", "cpu")
    assert training["images_a_second"] > 0 and training["batch"] == training["steps"] == 8
    assert "not_measured" in run.measured("kernel", "mini-clip", "cpu")


def test_how_soon_iterates_repeat(mini, shapes):
    assert repeats.first_that_came_back([*"abcbc"]) == (4, 2) and repeats.first_that_came_back([*"abc"]) == (0, 0)
    data = shapes.subset(4)
    long, short = (repeats.repeats(mini, data, 1.0, step, steps=100) for step in (1.0, 0.1))
    assert long["share_that_repeat"] == 1 and 3 <= long["median_step"] <= long["last_at"]
    assert long["last_at"] <= long["steps_of_the_whole_batch"] < 100
    assert short["share_that_repeat"] == 0 and short["steps_of_the_whole_batch"] == 100 and short["last_at"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel's time is that of a CUDA device")
def test_the_kernel_is_timed_by_the_devices_clock():
    found = run.measured("kernel", "mini-clip", "cuda")
    assert found["dtype"] == "float32" and found["triton_microseconds"] > 0 and found["copy_terabyte_s"] > 0


def test_attention_is_timed_on_tokens_as_the_model_makes_them():
    pytest.importorskip("triton")
    amp = load_clip("mini-clip", "mini", "cpu", "amp_bf16")  # as "auto" is on a GPU
    calls = run.attention_calls(amp, 3)
    found, expected = calls["triton"](), calls["eager"]()
    assert [tuple(x.shape) for x in found] == [(3, 128), (3, 49, 128)] and found[1].dtype == torch.float32
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_operations_are_those_that_the_step_needs():
    """In forwards of the batch: two attack steps 2 x 2, attacked and clean images 2 x 3, the original 1."""
    numbers = run.operations("mini-clip", torch.device("cpu"))
    assert 10.7 < numbers["ours_forwards"] < 11 and 9.7 < numbers["ours_forwards_after_the_first_epoch"] < 10
    assert numbers["released_forwards"] > 17.5  # 18 without its prompts


def test_the_released_step_has_the_same_loss(mini, shapes):
    """Its attack starts elsewhere and it divides no weights' work, but with no step to take the loss is the same."""
    settings = run.SETTINGS.model_copy(update={"train_numsteps": 0, "train_eps": 0.0})
    images, labels = shapes.images[:6] / 255, shapes.labels[:6]
    tuned = mini.frozen_copy()
    with torch.no_grad():
        tuned.visual.proj.mul_(1.1).add_(0.01)
    tuned.model.requires_grad_(True)
    tokens = mini.tokenizer(list(shapes.prompts))
    theirs = released.released_step(tuned, mini.frozen_copy(), images, labels, tokens, settings).item()
    step = run.Step(tuned, mini, images, labels, shapes.prompts)
    step.adversarial = run.attacked(step, run.TGA, settings, 0)
    ours = sum(term.weight * term.value for term in run.TGA.terms(step, settings))
    assert ours.item() == pytest.approx(theirs, rel=1e-4)
    tuned.model.requires_grad_(False)


def test_what_is_wanted_beside_another_job():
    times = {"PASSIVE": {"idle": [9.0, 1.04, 1.1], "busy": [2.5, 3.0]}, "ACTIVE": {"idle": [1.0], "busy": [8.0]}}
    found = busy.summary(times)
    assert found["fastest"]["PASSIVE"] == {"idle": 1.04, "busy": 2.5} and found["as_wanted"]
    assert found["ratios"] == pytest.approx(
        {"passive_to_active_idle": 1.04, "passive_busy_to_idle": 2.5 / 1.04, "active_busy_to_idle": 8.0}
    )
    slow_idle = {"PASSIVE": {"idle": [1.1], "busy": [2.0]}, "ACTIVE": {"idle": [1.0], "busy": [8.0]}}
    slow_busy = {"PASSIVE": {"idle": [1.0], "busy": [2.6]}, "ACTIVE": {"idle": [1.0], "busy": [8.0]}}
    assert not busy.summary(slow_idle)["as_wanted"] and not busy.summary(slow_busy)["as_wanted"]
