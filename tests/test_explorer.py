import io
import re
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tensors_alive
from PIL import Image

from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import Step
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.core.training import attacked, trainable
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.display import attack_viewer, controls, panels
from tgazsr_utils.display import explorer as ex
from tgazsr_utils.display.attack_viewer import NO_OTHER
from tgazsr_utils.measuring import measure, tried
from tgazsr_utils.measuring.attacked_image import Question, attack_image, never_read
from tgazsr_utils.measuring.loss_mixture import TERMS, TGA, TermGradients, cosines, in_words, mixture, term_gradients
from tgazsr_utils.measuring.measure import evaluate
from tgazsr_utils.measuring.recorded_sweep import nearest_measured, recorded_sweep
from tgazsr_utils.parameters import ExplorerNotebook, validate
from tgazsr_utils.profiles import default_parameters
from tgazsr_utils.progress import HEADLESS
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import SHIPPED, load_clip


@pytest.fixture(scope="module")
def train_set():
    return load_dataset("shapes", "train", n=12)


@pytest.fixture
def explorer(mini, shapes, train_set, tmp_path, monkeypatch):
    monkeypatch.setattr(tried, "IMAGES", 8)  # that an outcome is measured on
    given = {"output": str(tmp_path), "warmup_steps": 1, "batch_size": 4}
    settings = validate(ExplorerNotebook, default_parameters("05_alpha_beta_explorer") | given)
    models = ex.Models(mini, SHIPPED["mini-tga-zsr"], Run(tmp_path / "run"))
    training, attack = settings.only(FinetuneSettings), settings.only(AttackSettings)
    return ex.Explorer(models, shapes, train_set, training, attack, tmp_path)


def wait_for(condition, seconds=600):
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
    assert table.weighted["sum"] == pytest.approx(loss.item(), rel=1e-4)
    assert table.value[list(TERMS)].tolist() == pytest.approx([values[name] for name in TERMS], rel=1e-4)
    assert table.gradient["sum"] == pytest.approx(slope.norm().item(), rel=1e-3)
    assert table.weight.tolist()[:3] == [1, Alpha, Beta] and table.cosine["sum"] == 1
    between = cosines(gradients).to_numpy()
    assert (abs(between) <= 1.0001).all() and between.diagonal() == pytest.approx([1, 1, 1])
    assert table.along.drop("sum").sum() == pytest.approx(table.gradient["sum"], rel=1e-6) == table.along["sum"]


def test_a_term_without_a_gradient_has_no_direction():
    gradients = TermGradients((1.0, 2.0, 0.0), np.diag([4.0, 9.0, 0.0]))
    table = mixture(gradients, 0.5, 0.5)
    assert (
        np.isnan(table.cosine["L_AMC"])
        and table.gradient["sum"] == pytest.approx(2.5)
        and "–" in panels.mixture_html(gradients, 0.5, 0.5)
    )
    assert mixture(gradients, 0, 0).cosine["CE"] == 1 and cosines(gradients).loc["CE", "L_AR"] == 0
    assert in_words(mixture(gradients, 0, 0.3), cosines(gradients)).endswith("CE alone.")


def test_the_mixer_says_what_the_weights_make_of_the_loss_and_of_its_gradient():
    """Gradients of lengths 3 and 20, at an angle whose cosine is -0.5; the third is zero."""
    gradients = TermGradients((1.0, 10.0, 0.0), np.array([[9.0, -30.0, 0.0], [-30.0, 400.0, 0.0], [0.0, 0.0, 0.0]]))
    words, more = (in_words(mixture(gradients, a, 0.05), cosines(gradients)) for a in (0.1, 0.2))
    assert words.startswith("Of the loss: CE 50 %, L_AR 50 %, L_AMC 0 %. The gradient of L_AR is 0.7 times that of CE")
    assert words.endswith("points away from it (cosine -0.50).") and "1.3 times" in more
    shown = panels.mixture_html(gradients, 0.1, 0.05)
    assert words in shown and shown.count("-0.50") == 3  # in the sentence, and twice in the matrix
    assert "The three norms add to 5.00; 2.65 is the norm of the summed gradient" in shown


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
    still = attack_image(mini, shapes, 3, "a cross", 0.0, 1, "reference")
    shown = panels.attacked_html({"one": seen, "two": still})
    assert shown.count("<img") == 2 * 7 and shown.count('class="pair"') == 2 * 2
    assert f"two: the answer stays {still.before[0][0]}" in shown and ("flips" in shown) == seen.flipped


def test_an_image_is_asked_any_labels(mini, shapes):
    """Led away from its class where that is one of them, else from what it is seen as."""
    name, prompt = shapes.class_names[int(shapes.labels[0])], shapes.prompts[int(shapes.labels[0])]
    question = Question.of(shapes, ["zebra", name, "red square"])
    assert question.prompts == ("This is a photo of a zebra", prompt, "This is a photo of a red square")
    assert Question.of(shapes) == Question(shapes.class_names, shapes.prompts)
    how = "a cross", 1.0, 1, "reference"
    seen = attack_image(mini, shapes, 0, *how, question)
    assert seen.label == name and {label for label, _ in seen.before} == {*question.labels}
    apart = attack_image(mini, shapes, 0, *how, Question.of(shapes, ["ring", "bar"]))
    assert apart.label == apart.before[0][0] and sum(p for _, p in apart.before) == pytest.approx(1, abs=1e-4)
    assert never_read(mini, shapes, ["zebra", "Red hearts", "letter K", "dog on grass"]) == ["zebra", "dog"]


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
    assert svg.count(">± ") == 3 * 8 and f">± {own.robust_ci.iloc[0]:.1f}<" in svg  # an interval in each cell


def test_a_slider_moves_all_that_depends_on_it(explorer, monkeypatch):
    before = explorer.mixer.result.value, explorer.surface.result.value
    terms, encoded, encode = explorer.mixer.terms, [], Clip.encode_image
    monkeypatch.setattr(Clip, "encode_image", lambda *a: encoded.append(len(a[1])) or encode(*a))
    for value in np.linspace(0.01, 0.4, 20):
        explorer.Alpha.value = value
    assert not encoded and explorer.mixer.terms is terms  # mixed, not computed anew
    assert explorer.mixer.result.value != before[0] and explorer.surface.result.value != before[1]
    assert "nearest measured, outlined: (0.32, 0.05)" in explorer.surface.status.value
    explorer.mixer.reset()
    assert (explorer.mixer.result.value, explorer.surface.result.value) == before
    explorer.metric.value = "cos"
    assert explorer.mixer.terms is not terms
    shown, dimmed = explorer.attack.result.value, []
    attack = lambda *a: dimmed.append("tga-working" in explorer.attack.result._dom_classes) or attack_image(*a)
    monkeypatch.setattr(attack_viewer, "attack_image", attack)
    encoded.clear()
    explorer.attack.eps.value = 8.0
    assert 0 < max(encoded) <= 2 and explorer.attack.result.value != shown  # of one image, before and after
    assert list(explorer.attack.attacked) == ["original", "tuned"] and dimmed == [True, True]
    explorer.attack.play.value = 2
    assert explorer.attack.eps.value == 2.0
    explorer.attack.eps.value = 4.75
    assert explorer.attack.play.value == 5 and explorer.attack.eps.value == 4.75  # it goes on from there
    explorer.attack.other.value = NO_OTHER
    assert list(explorer.attack.attacked) == ["original"] and explorer.attack.result.value.count("<h3>") == 1
    explorer.attack.flip.value = True
    assert "tga-flip" in explorer.attack.result._dom_classes
    assert "tga-working" not in explorer.attack.result._dom_classes  # no longer


def test_moves_of_sliders_keep_nothing(explorer):
    alive = []
    for _ in range(3):
        for alpha, eps in ((0.1, 1.0), (0.2, 2.0), (0.3, 4.0)):
            explorer.Alpha.value, explorer.attack.eps.value = alpha, eps
        alive.append(tensors_alive())
    assert alive[0] == alive[1] == alive[2]


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
        panel.own.shape == (3, 56, 56)
        and "your image" in panel.status.value
        and panel.attacked["original"].image[0].mean() > 0.9
    )
    seen_as = panel.attacked["original"].before[0][0]
    assert panel.text.value == f"This is a photo of a {seen_as}"  # not of the image before
    panel.labels.value = "red square, dog"  # the prompt follows
    assert {label for label, _ in panel.attacked["tuned"].before} == {"red square", "dog"}
    assert panel.text.value == "This is a photo of a red square" and "no caption with “dog”" in panel.status.value
    shown = panel.result.value
    upload(panel, b"not an image")
    assert ">This is not an image I can read: mine.png<" in panel.status.value and panel.result.value == shown
    upload(panel, file.getvalue()[:90])
    assert "This is not an image I can read: mine.png (" in panel.status.value and panel.result.value == shown
    panel.labels.value = " , "
    assert "there are no labels" in panel.status.value and panel.result.value == shown
    assert not panel.back.disabled
    panel.back.click()
    assert panel.own is None and panel.back.disabled and "image 0 of shapes" in panel.status.value
    assert len(panel.question().labels) == 10 and "no caption" not in panel.status.value
    panel.image.value = 5
    assert "image 5 of shapes" in panel.status.value
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
        attacked = panel.attacked["original"]
        assert torch.equal(attacked.image, panel.own)
        assert panel.result.value.count("image, 56 × 56</figcaption>") == 2
        assert panel.text.value.endswith(attacked.label) and attacked.label == attacked.before[0][0]
        panel.text.value = "something else"
        panel.image.value = 7 - panel.image.value
        label = explorer.data.class_names[int(explorer.data.labels[panel.image.value])]
        assert panel.text.value.endswith(label) and panel.upload.value == ()
        assert {seen.label for seen in panel.attacked.values()} == {label}
        assert panel.own is None and "your image" not in panel.status.value


def test_panels_leave_their_html_where_there_are_no_widgets(explorer, tmp_path, monkeypatch):
    for panel in (explorer.mixer, explorer.attack, explorer.surface, explorer.trainer):
        monkeypatch.setenv(HEADLESS, "1")
        with pytest.raises(NotImplementedError):  # IPython then takes the bundle
            panel._ipython_display_()
        bundle = panel._repr_mimebundle_()
        assert set(bundle) == {"text/html", "text/plain"}
        saved = panel.save(tmp_path, "panel")
        assert saved == tmp_path / "figures" / "panel.html" and [*saved.parent.iterdir()] == [saved]
        for text in (bundle["text/html"], saved.read_text(encoding="utf-8")):
            assert panel.result.value in text and panel.status.value in text and "<style>" in text
            assert not re.search(r"(src|href)=.(?!data:)|<script|@import|url\(", text)  # self-contained
    assert explorer.trainer.result.value.count("<polyline") == 4 and "was trained" in explorer.trainer.status.value
    assert len(explorer.trainer.history) > 50 and "8 held-out images of shapes" in explorer.trainer.status.value


def test_a_saved_notebook_shows_what_was_seen_last(explorer, monkeypatch):
    """Beside the widgets there is HTML, which is brought up to date with them."""
    shown = []
    monkeypatch.setattr(controls, "display", lambda what, **options: shown.append(what) or Display())
    Display = type("Display", (), {"update": lambda self, what: shown.append(what)})
    monkeypatch.delenv(HEADLESS, raising=False)
    explorer.mixer._ipython_display_()
    assert shown[0] is explorer.mixer.widget and explorer.mixer.html in shown[1].data
    explorer.Alpha.value = 0.25
    assert len(shown) == 3 and explorer.mixer.html in shown[2].data and "0.250" in shown[2].data


def test_the_loss_and_its_weighted_terms_are_lines():
    rows = [{"step": step, "loss": 3.0 - step, "CE": 1.0, "L_AR": 10.0, "L_AMC": 20.0} for step in range(2)]
    svg = panels.curves_svg(rows, (0.1, 0.05), 4)
    assert svg.count("<polyline") == 4 and all(f"{name}<" in svg for name in ("CE 1.00", "0.1 L_AR 1.00", "loss 2.00"))
    lines = [re.findall(r"[\d.]+,([\d.]+)", points) for points in re.findall(r'points="([^"]*)"', svg)]
    assert lines[0] == lines[1] == lines[2] and lines[3][0] == "10.0" and all(len(line) == 2 for line in lines)


def test_a_panel_that_failed_is_not_saved(explorer, tmp_path):
    explorer.attack.text.value = " "
    with pytest.raises(ValueError, match="the prompt is empty"):
        explorer.attack.save(tmp_path, "panel")
    explorer.attack.text.value = "a cross"
    assert explorer.attack.save(tmp_path, "panel").exists()


def test_fine_tuning_runs_once_can_be_cancelled_and_goes_on(explorer):
    trainer = explorer.trainer
    kept = len(trainer.history)
    trainer.begin()
    first = trainer.thread
    trainer.begin()  # a second click
    assert trainer.thread is first and trainer.start.disabled and not trainer.stop.disabled
    wait_for(lambda: 0 < len(trainer.history) < kept)
    trainer.cancel()
    wait_for(lambda: not first.is_alive())
    assert "cancelled after step" in trainer.status.value and not trainer.start.disabled and trainer.stop.disabled
    assert explorer.models.names == ["original", "tuned"] and explorer.surface.tried == []
    done = trainer.bar.value
    assert 0 < done < 3
    before = list(trainer.history)
    trainer.history = []
    trainer.begin()
    wait_for(lambda: not trainer.thread.is_alive())
    assert trainer.history[:done] == before and [row["step"] for row in trainer.history] == [0, 1, 2]  # it went on
    assert trainer.result.value.count("<polyline") == 4
    assert len(explorer.models.names) == 3 and explorer.models.names[2].startswith(
        "TGA-ZSR, Alpha 0.08, Beta 0.05, seed 0 ("
    )
    explorer.attack.model.value = explorer.mixer.model.value = explorer.models.names[2]
    assert 'class="error"' not in explorer.attack.status.value + explorer.mixer.status.value


def test_fine_tuning_ends_in_an_outcome_that_stays(explorer, mini, train_set, tmp_path, monkeypatch):
    """Measured as it is elsewhere, compared with the published setting, starred on the map, there the next time."""
    trainer, surface = explorer.trainer, explorer.surface
    explorer.Alpha.value = 0.2
    trainer.begin()
    wait_for(lambda: not trainer.thread.is_alive())
    assert trainer.error is None, trainer.error
    own, published = surface.tried
    assert own.place == (0.2, 0.05) and published.place == (0.08, 0.05) and trainer.outcome == own
    assert f"Yours {own}, published setting {published}, in percent; yours minus published" in trainer.result.value
    attack, held_out = explorer.tried.attack, explorer.tried.data
    assert attack.test_stepsize == attack.test_eps / 4 and own.robust.n == 8 == len(held_out) == own.clean.n
    model = explorer.models[next(name for name in explorer.models.names if "Alpha 0.2," in name)]
    for kind, one in (("robust", attack), ("clean", None)):
        assert getattr(own, kind).hits == evaluate(model, held_out, one, method="TGA-ZSR").hits
    robust, clean = own.robust, own.clean
    assert re.match(rf"{robust.accuracy:.0f} \[\d+, \d+\] robust / {clean.accuracy:.0f} \[\d+, \d+\] clean$", str(own))
    assert surface.result.value.count("<polygon") == 3 * 2 and "★ yours" in surface.result.value
    explorer.metric.value = "l1"  # another training, of which nothing is tried
    assert surface.tried == [] and "<polygon" not in surface.result.value

    models = ex.Models(mini, None, Run(tmp_path / "run"))
    monkeypatch.setattr(measure, "answer", None)  # what is measured is only read
    again = ex.Explorer(models, explorer.data, train_set, explorer.training, attack, tmp_path)
    assert [outcome.place for outcome in again.surface.tried] == [own.place, published.place]
    again.trainer.begin()
    wait_for(lambda: not again.trainer.thread.is_alive())
    assert again.trainer.error is None and f"At the published setting, in percent: {published}" in again.trainer.html
    explorer.tried.file.write_text("not a record\n")
    again.surface.read()
    assert "05_tried.jsonl is damaged" in again.surface.status.value


def test_it_opens_without_a_tuned_model(explorer, mini, train_set, tmp_path):
    models = ex.Models(mini, None, Run(tmp_path / "none"))
    attack = AttackSettings(test_eps=1, test_stepsize=1, test_numsteps=1)
    alone = ex.Explorer(models, train_set, train_set, explorer.training, attack, tmp_path)
    assert models.names == ["original"] == list(alone.attack.model.options) and alone.mixer.error is None
    assert alone.attack.other.value == NO_OTHER and list(alone.attack.attacked) == ["original"]
    assert alone.mixer.terms.values[TERMS.index("L_AMC")] == 0 and "Shown:" not in alone.trainer.status.value
    assert "<svg" not in alone.trainer.result.value  # nothing was trained
    assert "held-out" not in alone.trainer.status.value and "8 images of shapes, tuned on too" in alone.measured_on


def test_what_goes_wrong_in_the_background_is_said_in_the_panel(explorer, monkeypatch):
    def broken(*arguments, **options):
        raise FloatingPointError("loss is not finite <at step 3>")

    monkeypatch.setattr(ex, "finetune", broken)
    explorer.trainer.begin()
    wait_for(lambda: not explorer.trainer.thread.is_alive())
    assert 'class="error">FloatingPointError: loss is not finite &lt;at step 3&gt;' in explorer.trainer.status.value
    assert not explorer.trainer.start.disabled
