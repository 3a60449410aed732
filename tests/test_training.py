import os
import signal
from dataclasses import replace
from functools import partial
from itertools import islice

import pandas as pd
import pytest
import torch
from conftest import train_settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tgazsr_utils.core import training
from tgazsr_utils.core.attacks import pgd
from tgazsr_utils.core.objectives import Objective, Step, Term, find_objective
from tgazsr_utils.core.seeds import Noise
from tgazsr_utils.core.training import NotFinite, attacked, in_openai_order, optimizer_of, steps, warmup_cosine
from tgazsr_utils.datasets.files import Files
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.measuring.measure import evaluate
from tgazsr_utils.parameters import PretrainNotebook
from tgazsr_utils.pretraining import contrastive_loss, miniworld_pairs, photo_pairs, pretrain
from tgazsr_utils.runtime import finetuning
from tgazsr_utils.runtime.files import load_tensors
from tgazsr_utils.runtime.finetuning import finetune
from tgazsr_utils.runtime.fingerprints import code_version, fingerprint
from tgazsr_utils.runtime.weights import load_clip

SETTINGS = train_settings(epochs=2)


@pytest.fixture(scope="module")
def train_set():
    return load_dataset("shapes", "train", n=20)  # three steps an epoch, the last one short


def weights_of(result):
    return load_clip("mini-clip", result.weights, "cpu").model.state_dict()


def stop_after(steps):
    seen = iter(range(1, 1000))
    return lambda: next(seen) == steps


@pytest.mark.parametrize("method, steps", [("TGA-ZSR", 1), ("TGA-ZSR", 3), ("TGA-ZSR", 4), ("FARE-RobustVLM", 4)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(mini, train_set, tmp_path, method, steps):
    whole = finetune(mini, train_set, method, SETTINGS, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match=f"step {steps} of 6"):
        finetune(mini, train_set, method, SETTINGS, tmp_path / "parts", stop=stop_after(steps))
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    parts = finetune(mini, train_set, method, SETTINGS, tmp_path / "parts")
    settings = parts.clip.training_record["settings"]
    assert settings["optimizer"] == ("adamw" if method == "FARE-RobustVLM" else "sgd")
    first, second = weights_of(whole), weights_of(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)
    columns = [c for c in whole.history if c != "seconds"]
    pd.testing.assert_frame_equal(whole.history[columns], parts.history[columns], check_exact=True)
    assert not list((tmp_path / "parts").glob("*.ckpt"))


def test_weights_are_the_originals_until_a_step_is_done(mini, train_set, monkeypatch):
    """Not until a step's number: the first batch may hold no image that can be read."""
    monkeypatch.setattr(training, "batches", partial(lambda real, *given: islice(real(*given), 1, 3), training.batches))
    objective, tuned, found = find_objective("TeCoA"), mini.frozen_copy(), []
    settings = objective.with_preset(SETTINGS.model_copy(update={"lr": 0.1, "warmup_steps": 0}))
    look = lambda step, *_: found.append(step.untouched) or step.images
    list(steps(tuned, mini, train_set, objective, settings, optimizer_of(tuned, settings), make_adversarial=look))
    assert found == [True, False]


def test_files_to_tune_on_are_decoded_once_for_all_methods(mini, photo_root, tmp_path, monkeypatch):
    """Where they are kept at their own size, as Tiny-ImageNet's are."""
    data = load_dataset("tiny", "train", photo_root, image_size=112, decode=False)
    clip = load_clip("mini-clip", "mini", "cpu", image_size=112)
    decoded, decode = [], Files._decode
    monkeypatch.setattr(Files, "_decode", lambda self, row, masks: decoded.append(row) or decode(self, row, masks))
    for method in ("TeCoA", "TGA-ZSR"):
        finetune(clip, data, method, SETTINGS.model_copy(update={"epochs": 1}), tmp_path)
    assert sorted(decoded) == sorted([*range(len(data)), 0])  # the first says of what size they are


@pytest.mark.parametrize(
    "method, kind, decay", [("TGA-ZSR", torch.optim.SGD, 0), ("FARE-RobustVLM", torch.optim.AdamW, 1e-4)]
)
def test_optimiser_and_start_are_those_of_the_settings(mini, train_set, method, kind, decay):
    objective, tuned = find_objective(method), mini.frozen_copy()
    settings = objective.with_preset(SETTINGS)
    optimizer = optimizer_of(tuned, settings)
    assert type(optimizer) is kind and optimizer.defaults["weight_decay"] == decay
    batch = next(train_set.batches(8))
    step = Step(tuned, mini, batch.images, batch.labels, train_set.prompts)
    found = attacked(step, objective, settings, 0)
    arguments = step.clip, step.images, step.labels, step.text, 3 / 255, 3 / 255, 1
    for start in ("cut", "uncut"):
        generators = Noise.named(torch.arange(8), "training", 0, 1, 0)
        expected = pgd(*arguments, start=start, loss=objective.attack(step), generator=generators)
        assert torch.equal(found, expected) == (start == settings.train_start)


def test_what_the_original_model_makes_of_images_is_computed_once_and_checked(mini, train_set, tmp_path, passes, capfd):
    """Also over a resumed run; a damaged file is made anew with the same outcome, and none is left in the end."""
    original = lambda: sum(n for n, _ in passes) - trained  # images that passed the original model
    whole = finetune(mini, train_set, "TGA-ZSR", SETTINGS, tmp_path / "whole")
    trained = 2 * (20 * (SETTINGS.train_numsteps + 2) + 8)  # the first images are looked at before an epoch is kept
    assert original() == 20  # not 40, in two epochs
    assert not list((tmp_path / "whole" / "unfinished").glob("*"))
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:50]), lambda path: _flip(path), None):
        folder = tmp_path / str(id(damage))
        with pytest.raises(KeyboardInterrupt):
            finetune(mini, train_set, "TGA-ZSR", SETTINGS, folder, stop=stop_after(3))
        (kept,) = (folder / "unfinished").glob("*_text-reference.safetensors")
        if damage:
            damage(kept)
        passes.clear()
        parts = finetune(mini, train_set, "TGA-ZSR", SETTINGS, folder)
        trained = 20 * (SETTINGS.train_numsteps + 2) + 8
        assert original() == (20 if damage else 0)
        assert ("is damaged" in capfd.readouterr().out) == bool(damage)
        first, second = weights_of(whole), weights_of(parts)
        assert all(torch.equal(first[name], second[name]) for name in first)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(bytes(content))


def test_ctrl_c_finishes_the_step_and_writes_a_checkpoint(mini, train_set, tmp_path):
    press, before = stop_after(2), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="step 2 of 6"):
        finetune(
            mini, train_set, "TeCoA", SETTINGS, tmp_path, stop=lambda: press() and os.kill(os.getpid(), signal.SIGINT)
        )
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert checkpoint.name.endswith(".step2.ckpt") and load_tensors(checkpoint)[1]["state"]["step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_loaded_and_other_settings_are_another_run(mini, train_set, tmp_path):
    first = finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path)
    again = finetune(mini, train_set, "TeCoA", SETTINGS, tmp_path)
    assert again.weights == first.weights
    pd.testing.assert_frame_equal(first.history, again.history)
    assert fingerprint(first.clip) == fingerprint(again.clip)
    other = finetune(mini, train_set, "TeCoA", SETTINGS.model_copy(update={"seed": 1}), tmp_path)
    assert (
        first.clip.training_record
        == again.clip.training_record
        == {
            "method": "TeCoA",
            "settings": first.clip.training_record["settings"],
            "data": fingerprint(train_set),
            "code": code_version(finetuning.__name__),
        }
    )
    assert first.clip.training_record["settings"]["lr"] == SETTINGS.lr and mini.training_record == {}
    assert evaluate(again.clip, train_set, None, method="TeCoA").training == first.clip.training_record
    assert other.weights != first.weights and fingerprint(other.clip) != fingerprint(first.clip)


def test_an_objective_with_another_body_is_another_run(mini, train_set, tmp_path):
    """Two functions of one name, as when a notebook cell is edited."""
    settings = SETTINGS.model_copy(update={"epochs": 1})
    half = lambda step, settings: [Term("CE", 0.5, step.cross_entropy(step.adversarial_tokens))]
    whole = lambda step, settings: [Term("CE", 1.0, step.cross_entropy(step.adversarial_tokens))]
    runs = [finetune(mini, train_set, Objective("Mine", terms), settings, tmp_path) for terms in (half, whole)]
    assert fingerprint(runs[0].clip) != fingerprint(runs[1].clip)


def test_only_the_image_encoder_is_tuned_and_the_given_model_stays(mini, train_set, tmp_path):
    before = {k: v.clone() for k, v in mini.model.state_dict().items()}
    tuned = weights_of(finetune(mini, train_set, "TGA-ZSR", SETTINGS, tmp_path))
    assert all(torch.equal(before[k], v) for k, v in mini.model.state_dict().items())
    changed = {k for k in before if not torch.equal(before[k], tuned[k])}
    assert changed == {k for k in before if k.startswith("visual.")}


def test_last_num_ft_tunes_the_last_parameter_tensors(mini, train_set, tmp_path):
    settings = SETTINGS.model_copy(update={"last_num_ft": 2})
    tuned = weights_of(finetune(mini, train_set, "TeCoA", settings, tmp_path))
    changed = {k for k, v in mini.model.state_dict().items() if not torch.equal(v, tuned[k])}
    assert changed == {"visual." + name for name, _ in list(mini.visual.named_parameters())[-2:]}
    visual = nn.ModuleDict({"resblocks": mini.frozen_copy().visual.transformer.resblocks[-1:]})
    visual["resblocks"][0].ls_1 = nn.PReLU(3)  # as other architectures have more than OpenAI's
    names = {id(p): name for name, p in visual.named_parameters()}
    assert [names[id(p)].split(".")[2] for p in in_openai_order(visual)] == [
        *4 * ["attn"],
        *2 * ["ln_1"],
        *4 * ["mlp"],
        *2 * ["ln_2"],
        "ls_1",
    ]


def test_passes_through_the_encoder_in_one_step(mini, train_set, tmp_path, monkeypatch, passes):
    """Attack steps, then attacked and clean images in one pass; the original once; a look at the outcome. No text."""
    settings = SETTINGS.model_copy(update={"epochs": 1, "batch_size": 20, "train_numsteps": 2})
    mini.encode_text(train_set.prompts)
    monkeypatch.setattr(type(mini.model), "encode_text", lambda *a, **k: pytest.fail("text was encoded"))
    finetune(mini, train_set, "TGA-ZSR", settings, tmp_path)
    assert passes == [(20, False), (20, False), (40, True), (20, False), (8, True)]  # in an attack weights are frozen


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [warmup_cosine(step, 4, 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[12] == pytest.approx(0.5) and factors[20] == pytest.approx(0)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert warmup_cosine(0, 0, 10) == 1.0


def test_the_published_learning_rate_is_the_default(mini, train_set, tmp_path):
    settings = SETTINGS.model_copy(update={"lr": None, "epochs": 1, "warmup_steps": 1})
    history = finetune(mini, train_set, "TGA-ZSR", settings, tmp_path).history
    assert history.lr.max() == pytest.approx(1e-4)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_term(mini, train_set, tmp_path):
    broken = Objective(
        "Broken", lambda step, settings: [Term("CE", 1.0, float("nan") * step.cross_entropy(step.adversarial_tokens))]
    )
    with pytest.raises(FloatingPointError, match="Broken is not finite at step 0: CE nan"):
        finetune(mini, train_set, broken, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="method 'Nonsense' is unknown; there are: FT-Clean, FT-Adv., TeCoA"):
        finetune(mini, train_set, "Nonsense", SETTINGS, tmp_path)


@pytest.mark.parametrize("at_once", [1, 16])
def test_a_gradient_that_is_not_finite_stops_with_its_term_and_the_last_good_checkpoint(
    mini, train_set, tmp_path, monkeypatch, at_once
):
    """Values are finite, and so is the cross-entropy's gradient; the root of zero has none. From epoch two on.

    Also if steps after it were made before its numbers are read, as on CUDA.
    """
    monkeypatch.setattr(finetuning, "READ_EVERY", {"cpu": at_once})
    seen = []

    def terms(step, settings):
        seen.append(step)
        factor = 1.0 if len(seen) <= 3 else 0.0
        root = (factor * step.adversarial_tokens.pooled.square().sum()).sqrt()
        return [Term("CE", 1.0, step.cross_entropy(step.adversarial_tokens)), Term("L_root", 1e-3, root)]

    broken = Objective("Broken", terms)
    with pytest.raises(
        FloatingPointError, match="gradient of Broken is not finite at step 3: that of L_root; .* checkpoint is .*ckpt"
    ):
        finetune(mini, train_set, broken, SETTINGS, tmp_path)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    weights, about = load_tensors(checkpoint)
    assert about["state"]["step"] == 3 and all(torch.isfinite(value).all() for value in weights.values())
    assert all(row["gradient_norm"] > 0 for row in about["state"]["history"])


@pytest.mark.parametrize("method", ["TGA-ZSR", "Comp-TGA", "Vision-based-grad", "FARE-RobustVLM"])
def test_a_step_waits_for_nothing_and_changes_no_weights_once_one_was_not_finite(mini, train_set, method):
    """As operators show: a number is read where ``Update.values`` is asked for, and nowhere else."""

    class Reads(TorchDispatchMode):
        count, unordered = 0, []  # the gradient of interpolate has no order on CUDA, so that a seed would not repeat

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Reads.count += function is torch.ops.aten._local_scalar_dense.default
            Reads.unordered += [str(function)] if "upsample" in str(function) else []
            return function(*args, **kwargs or {})

    objective, tuned = find_objective(method), mini.frozen_copy()
    settings = objective.with_preset(SETTINGS)
    optimizer = optimizer_of(tuned, settings)
    updates = steps(tuned, mini, train_set, objective, settings, optimizer)
    next(updates)  # which encodes prompts
    with Reads():
        update = next(updates)
    assert not Reads.unordered and Reads.count == 0 and update.values()["loss"] > 0
    with torch.no_grad():
        tuned.visual.ln_post.bias[0], kept = float("inf"), tuned.visual.ln_post.bias[0].clone()
    bad = next(updates)
    with torch.no_grad():
        tuned.visual.ln_post.bias[0] = kept
    before = fingerprint(tuned)
    next(updates).values()  # itself sound
    assert fingerprint(tuned) == before
    with pytest.raises(NotFinite, match="not finite at step 2"):
        bad.values()


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_model_that_diverges_in_the_last_step_of_an_epoch_is_not_kept(mini, tmp_path, epochs):
    """Loss and gradient were finite: neither a checkpoint nor weights are written of what they have made."""
    data, settings = (
        load_dataset("shapes", "train", n=8),
        SETTINGS.model_copy(update={"epochs": epochs, "lr": 1e30, "warmup_steps": 0}),
    )
    with pytest.raises(
        FloatingPointError,
        match="TeCoA has diverged: its model gives no finite numbers after step 0; there is no checkpoint yet",
    ):
        finetune(mini, data, "TeCoA", settings, tmp_path)
    assert not list(tmp_path.glob("*.*"))


def test_training_lowers_the_loss_on_attacked_images(mini, tmp_path):
    data = load_dataset("shapes", "train", n=64)
    settings = SETTINGS.model_copy(update={"epochs": 6, "batch_size": 32, "lr": 1e-2})
    history = finetune(mini, data, "TeCoA", settings, tmp_path).history
    assert history.loss[-2:].mean() < 0.9 * history.loss[:2].mean()


def pretrain_settings(tmp_path, steps):
    return PretrainNotebook(
        arch="mini-clip",
        data_root=None,
        output=str(tmp_path),
        seed=0,
        sets=None,
        steps=steps,
        batch_size=8,
        lr=1e-3,
        warmup_steps=2,
        weight_decay=0.1,
        test_images=8,
        weights="unused",
        weights_precision="fp16",
        eps_candidates=[1],
        test_numsteps=1,
        device="cpu",
    )


def test_pretraining_resumes_bit_for_bit(tmp_path):
    settings = pretrain_settings(tmp_path, 4)
    whole = pretrain(miniworld_pairs(8, 0), settings, tmp_path / "whole")

    source = miniworld_pairs(8, 0)

    def interrupted(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return source.batch(step)

    with pytest.raises(KeyboardInterrupt, match="step 3 of 4"):
        pretrain(replace(source, batch=interrupted), settings, tmp_path / "parts")
    parts = pretrain(miniworld_pairs(8, 0), settings, tmp_path / "parts")
    assert fingerprint(parts.clip) == fingerprint(whole.clip)
    assert parts.history.loss.tolist() == whole.history.loss.tolist()


def test_pretraining_that_is_not_finite_stops_with_its_step(tmp_path):
    settings = pretrain_settings(tmp_path, 4).model_copy(update={"lr": 1e30, "warmup_steps": 0})
    with pytest.raises(
        FloatingPointError,
        match="pre-training is not finite at step 1: contrastive loss nan.*there is no checkpoint yet",
    ):
        pretrain(miniworld_pairs(8, 0), settings, tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))


def test_pretraining_that_diverges_in_its_last_step_is_not_kept(tmp_path):
    settings = pretrain_settings(tmp_path, 1).model_copy(update={"lr": 1e30, "warmup_steps": 0})
    with pytest.raises(
        FloatingPointError,
        match="pre-training has diverged: its loss is not finite after step 0; there is no checkpoint yet",
    ):
        pretrain(miniworld_pairs(8, 0), settings, tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))


def test_photo_pairs_follow_the_data_and_augmentation_keeps_the_range(photo_root):
    train = [load_dataset(key, "train", photo_root, image_size=64, preprocess="resize") for key in ("animals", "tiny")]
    source = photo_pairs(train, 16, seed=0, image_size=56)
    first, again, other = source.batch(0), source.batch(0), source.batch(1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.images.shape == (16, 3, 56, 56) and first.images.dtype == torch.uint8
    last_word = [caption.split()[-1] for caption in first.captions]  # fox, x, goldfish, bottle: one a class
    assert first.fits.tolist() == [[a == b for b in last_word] for a in last_word]
    assert photo_pairs(train[:1], 16, 0, 56).fingerprint != source.fingerprint


def test_contrastive_loss_takes_every_fit_as_a_positive():
    images, texts = torch.eye(2), torch.eye(2)[[0, 0, 1]]  # the first two captions are alike and fit the first image
    fits = torch.tensor([[True, True, False], [False, False, True]])
    scale = torch.tensor(2.0)
    e = torch.e**2
    by_image = [-torch.log(torch.tensor(e / (2 * e + 1))), -torch.log(torch.tensor(e / (e + 2)))]
    by_text = [-torch.log(torch.tensor(e / (e + 1)))] * 3
    expected = (sum(by_image) / 2 + sum(by_text) / 3) / 2
    assert contrastive_loss(images, texts, fits, scale).item() == pytest.approx(float(expected), rel=1e-5)
