import io
import re
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tgazsr_utils.core.objectives import Step
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.core.training import attacked, trainable
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.display import explorer as ex
from tgazsr_utils.display import panels
from tgazsr_utils.durable.runs import Run
from tgazsr_utils.durable.weights import SHIPPED, load_clip
from tgazsr_utils.measuring.attacked_image import attack_image
from tgazsr_utils.measuring.loss_mixture import TERMS, TGA, TermGradients, cosines, mixture, term_gradients
from tgazsr_utils.measuring.recorded_sweep import nearest_measured, recorded_sweep
from tgazsr_utils.parameters import ExplorerNotebook, validate
from tgazsr_utils.profiles import default_parameters
from tgazsr_utils.progress import HEADLESS


@pytest.fixture(scope="module")
def train_set():
    return load_dataset("shapes", "train", n=48)


@pytest.fixture
def explorer(mini, shapes, train_set, tmp_path):
    settings = validate(
        ExplorerNotebook, default_parameters("05_alpha_beta_explorer") | {"output": str(tmp_path), "warmup_steps": 1}
    )
    models = ex.Models(mini, SHIPPED["mini-tga-zsr"], Run(tmp_path / "run"))
    training, attack = settings.only(FinetuneSettings), settings.only(AttackSettings)
    return ex.Explorer(models, shapes, train_set, training, attack, tmp_path)


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(("Alpha", "Beta"), [(0.08, 0.05), (0.3, 0.0)])
def test_the_mixture_is_that_of_the_weighted_loss_itself(explorer, mini, train_set, Alpha, Beta):
    settings = explorer.finetuning().model_copy(update={"Alpha": Alpha, "Beta": Beta})
    chunk = next(train_set.batches(8))
    tuned = load_clip("mini-clip", "mini-tga-zsr", "cpu")
    gradients = term_gradients(tuned, mini, chunk.images, chunk.labels, train_set.prompts, settings)
    table = mixture(gradients, Alpha, Beta)

    weights = trainable(tuned.visual, 0)
    step = Step(tuned, mini, chunk.images, chunk.labels, train_set.prompts)
    step.adversarial = attacked(step, TGA, settings, 0)
    terms = TGA.terms(step, settings)
    loss, values = sum(term.weight * term.value for term in terms), {term.name: term.value.item() for term in terms}
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    assert table.weighted["sum"] == pytest.approx(loss.item(), rel=1e-5)
    assert table.value[list(TERMS)].tolist() == pytest.approx([values[name] for name in TERMS], rel=1e-5)
    assert table.gradient["sum"] == pytest.approx(slope.norm().item(), rel=1e-4)
    assert table.weight.tolist()[:3] == [1, Alpha, Beta] and table.cosine["sum"] == 1
    assert all(-1 <= c <= 1.0001 for c in cosines(gradients).values())
    terms = table.drop("sum")
    assert (terms.cosine * terms.gradient).sum() == pytest.approx(
        table.gradient["sum"], rel=1e-6
    )  # parts along the sum


def test_a_term_without_a_gradient_has_no_direction():
    gradients = TermGradients((1.0, 2.0, 0.0), np.diag([4.0, 9.0, 0.0]))
    table = mixture(gradients, 0.5, 0.5)
    assert (
        np.isnan(table.cosine["L_AMC"])
        and table.gradient["sum"] == pytest.approx(2.5)
        and "–" in panels.mixture_html(gradients, 0.5, 0.5)
    )
    assert mixture(gradients, 0, 0).cosine["CE"] == 1 and cosines(gradients)["CE, L_AR"] == 0


def test_an_attacked_image_and_its_measures(mini, shapes):
    image, label = shapes.images[3] / 255, int(shapes.labels[3])
    seen = attack_image(mini, shapes, 3, "a cross", 3.5, 10, "reference")
    assert 0 < (seen.adversarial - image).abs().max() <= 3.5 / 255 + 1e-6 and seen.label == shapes.class_names[label]
    for top in (seen.before, seen.after):
        assert (
            len(top) == 5
            and [p for _, p in top] == sorted((p for _, p in top), reverse=True)
            and sum(p for _, p in top) <= 1.001
        )
    assert {"l2", "cosine", "iou_top20", "centre_move", "energy_clean"} <= set(seen.shift.index) and seen.shift.l2 > 0
    other = attack_image(mini, shapes, image, "something else", 0.0, 1, "cosine")
    assert other.before == other.after and other.label == other.before[0][0] and "energy_clean" not in other.shift
    assert not torch.equal(other.clean_map, seen.clean_map)
    assert panels.attacked_image_html(seen).count("<img") == 4


def test_the_nearest_point_is_a_measured_one(tmp_path):
    kept, where = recorded_sweep(tmp_path, "mini-world")
    assert len(kept) == 9 and "reference" in where
    assert recorded_sweep(tmp_path, "photographs") == (None, "no sweep is recorded: run notebook 03")
    for a, b, expected in (
        (0.08, 0.05, (0.08, 0.05)),
        (0.4, 0.0, (0.32, 0)),
        (0.03, 0.19, (0, 0.2)),
        (0.21, 0.04, (0.32, 0.05)),
    ):
        assert tuple(nearest_measured(kept, a, b)[["Alpha", "Beta"]]) == expected
    partial = kept[(kept.Alpha > 0) | (kept.Beta > 0)]
    assert tuple(nearest_measured(partial, 0, 0)[["Alpha", "Beta"]]) != (0, 0)  # not there, so not reported
    (tmp_path / "tables").mkdir()
    partial.to_csv(tmp_path / "tables" / "ablation_alpha_beta.csv", index=False)
    own, where = recorded_sweep(tmp_path, "photographs")
    assert len(own) == 8 and "notebook 03" in where
    svg = panels.sweep_svg(own, 0.1, 0.1)
    assert svg.count("<rect") == 3 * 8 and svg.count("<circle") == 3 and svg.count('stroke-width="3"') == 3


def test_a_slider_moves_all_that_depends_on_it_quickly(explorer):
    before = explorer.mixer.result.value, explorer.surface.result.value
    terms, times = explorer.mixer.terms, []
    for value in np.linspace(0.01, 0.4, 20):
        started = time.perf_counter()
        explorer.Alpha.value = value
        times.append(time.perf_counter() - started)
    assert sorted(times)[10] < 0.1 and explorer.mixer.terms is terms  # mixed, not computed anew
    assert explorer.mixer.result.value != before[0] and explorer.surface.result.value != before[1]
    assert "nearest measured, outlined: (0.32, 0.05)" in explorer.surface.status.value
    explorer.mixer.reset()
    assert (explorer.mixer.result.value, explorer.surface.result.value) == before
    explorer.metric.value = "cos"
    assert explorer.mixer.terms is not terms
    shown = explorer.attack.result.value
    started = time.perf_counter()
    explorer.attack.eps.value = 8.0
    assert time.perf_counter() - started < 1.0 and explorer.attack.result.value != shown


def upload(panel, content):
    panel.upload.value = (
        {
            "name": "mine.png",
            "type": "image/png",
            "size": len(content),
            "content": content,
            "last_modified": pd.Timestamp(0),
        },
    )


def test_an_image_of_ones_own_or_a_file_that_is_none(explorer):
    panel = explorer.attack
    file = io.BytesIO()
    Image.new("RGBA", (200, 120), (250, 0, 0, 255)).save(file, "PNG")
    upload(panel, file.getvalue())
    assert (
        panel.own.shape == (3, 56, 56) and "your image" in panel.status.value and panel.attacked.image[0].mean() > 0.9
    )
    assert panel.text.value == f"This is a photo of a {panel.attacked.before[0][0]}"  # not of the image before
    shown = panel.result.value
    upload(panel, b"not an image")
    assert ">This is not an image I can read: mine.png<" in panel.status.value and panel.result.value == shown
    upload(panel, file.getvalue()[:90])
    assert "This is not an image I can read: mine.png (" in panel.status.value and panel.result.value == shown
    panel.image.value = 5
    assert panel.own is None and "image 5 of shapes" in panel.status.value
    panel.text.value = "<script>alert(1)</script>"
    assert "<script" not in panel.result.value and 'class="error"' not in panel.status.value
    panel.text.value = "  "
    assert "the prompt is empty" in panel.status.value


def test_an_upload_is_seen_upright_and_as_the_model_sees_it_and_leaves_with_its_prompt(explorer):
    panel, file, exif = explorer.attack, io.BytesIO(), Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter: what is stored at the top is seen at the right
    image = Image.new("RGB", (300, 300))
    image.paste((255, 0, 0), (0, 0, 300, 150))
    image.save(file, "PNG", exif=exif)
    for _ in range(2):  # the same file once more, after an image of the set
        panel.text.value = "something else"
        upload(panel, file.getvalue())
        assert panel.own[0, :, -20:].mean() > 0.95 and panel.own[0, :, :20].mean() < 0.05
        assert torch.equal(panel.attacked.image, panel.own)
        assert panel.result.value.count("model's view, 56 × 56</figcaption>") == 1
        assert panel.text.value.endswith(panel.attacked.label) and panel.attacked.label == panel.attacked.before[0][0]
        panel.text.value = "something else"
        panel.image.value = 7 - panel.image.value
        label = explorer.data.class_names[int(explorer.data.labels[panel.image.value])]
        assert panel.text.value.endswith(label) and panel.attacked.label == label and panel.upload.value == ()
        assert panel.own is None and "your image" not in panel.status.value


def test_panels_leave_their_html_where_there_are_no_widgets(explorer, tmp_path, monkeypatch):
    widget = "application/vnd.jupyter.widget-view+json"
    for panel in (explorer.mixer, explorer.attack, explorer.surface, explorer.trainer):
        monkeypatch.delenv(HEADLESS, raising=False)
        assert {widget, "text/html", "text/plain"} <= set(panel._repr_mimebundle_())
        monkeypatch.setenv(HEADLESS, "1")
        bundle = panel._repr_mimebundle_()
        assert set(bundle) == {"text/html", "text/plain"}
        saved = panel.save(tmp_path, "panel")
        assert saved == tmp_path / "figures" / "panel.html" and [*saved.parent.iterdir()] == [saved]
        for text in (bundle["text/html"], saved.read_text(encoding="utf-8")):
            assert panel.result.value in text and panel.status.value in text and "<style>" in text
            assert not re.search(r"(src|href)=.(?!data:)|<script|@import|url\(", text)  # self-contained
    assert explorer.trainer.result.value.count("<polyline") == 1 and "was trained" in explorer.trainer.status.value
    assert len(re.findall(r"[\d.]+,[\d.]+", explorer.trainer.result.value)) == len(explorer.models.losses("tuned")) > 50


def test_a_panel_that_failed_is_not_saved(explorer, tmp_path):
    explorer.attack.text.value = " "
    with pytest.raises(ValueError, match="the prompt is empty"):
        explorer.attack.save(tmp_path, "panel")
    explorer.attack.text.value = "a cross"
    assert explorer.attack.save(tmp_path, "panel").exists()


def test_fine_tuning_runs_once_can_be_cancelled_and_goes_on(explorer):
    trainer = explorer.trainer
    trainer.begin()
    first = trainer.thread
    trainer.begin()  # a second click
    assert trainer.thread is first and trainer.start.disabled and not trainer.stop.disabled
    wait_for(lambda: trainer.losses)
    trainer.cancel()
    wait_for(lambda: not first.is_alive())
    assert "was cancelled after step" in trainer.status.value and not trainer.start.disabled and trainer.stop.disabled
    assert explorer.models.names == ["original", "tuned"]
    done = trainer.bar.value
    assert 0 < done < 3
    trainer.begin()
    wait_for(lambda: not trainer.thread.is_alive())
    assert set(trainer.losses) == set(range(done, 3))  # it went on
    assert len(explorer.models.names) == 3 and explorer.models.names[2].startswith(
        "TGA-ZSR, Alpha 0.08, Beta 0.05, seed 0 ("
    )
    explorer.attack.model.value = explorer.mixer.model.value = explorer.models.names[2]
    assert 'class="error"' not in explorer.attack.status.value + explorer.mixer.status.value


def test_it_opens_without_a_tuned_model(explorer, mini, train_set, tmp_path):
    models = ex.Models(mini, None, Run(tmp_path / "none"))
    attack = AttackSettings(test_eps=1, test_stepsize=1, test_numsteps=1)
    alone = ex.Explorer(models, train_set, train_set, explorer.training, attack, tmp_path)
    assert models.names == ["original"] == list(alone.attack.model.options) and alone.mixer.error is None
    assert alone.mixer.terms.values[TERMS.index("L_AMC")] == 0 and "Shown:" not in alone.trainer.status.value


def test_what_goes_wrong_in_the_background_is_said_in_the_panel(explorer, monkeypatch):
    def broken(*arguments, **options):
        raise FloatingPointError("loss is not finite <at step 3>")

    monkeypatch.setattr(ex, "finetune", broken)
    explorer.trainer.begin()
    wait_for(lambda: not explorer.trainer.thread.is_alive())
    assert 'class="error">FloatingPointError: loss is not finite &lt;at step 3&gt;' in explorer.trainer.status.value
    assert not explorer.trainer.start.disabled
