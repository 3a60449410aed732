"""The explorer: what Alpha and Beta do to the loss, and where attention goes under attack, as panels of widgets.

What a panel shows is drawn by ``display.panels``; the same HTML is its output where no widget can be shown.
"""

import io
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import PRESET
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.datasets.decoding import read_rgb
from tgazsr_utils.datasets.files import fit
from tgazsr_utils.display import panels
from tgazsr_utils.durable.files import write_atomic
from tgazsr_utils.durable.finetuning import finetune
from tgazsr_utils.durable.runs import Run
from tgazsr_utils.durable.weights import load_alike, read_metadata
from tgazsr_utils.measuring.attacked_image import AttackedImage, attack_image
from tgazsr_utils.measuring.loss_mixture import TERMS, TGA, TermGradients, term_gradients
from tgazsr_utils.measuring.recorded_sweep import KINDS, nearest_measured, recorded_sweep
from tgazsr_utils.progress import HEADLESS

BELOW_SLIDER = "2px 2px 8px 112px"  # margin that puts a widget under the track of a slider


class Models:
    """The models there are to choose from, by name; loaded when first asked for, the last few kept."""

    def __init__(self, original: Clip, tuned: str | Path | None, run: Run):
        self.original, self.run = original, run
        self._files: dict[str, Path] = {} if tuned is None else {"tuned": Path(tuned)}
        self.start = "original" if tuned is None else "tuned"
        self._loaded: dict[str, Clip] = {"original": original}
        self.refresh()

    def refresh(self) -> None:
        """Finds the models that the run shows, the latest first, at most 30."""
        found = sorted(self.run.models.glob("[!.]*.safetensors"), key=lambda path: path.lstat().st_mtime, reverse=True)
        for path in found[:30]:
            self._files.setdefault(self.name_of(path), path)

    @property
    def names(self) -> list[str]:
        return ["original", *self._files]

    @staticmethod
    def name_of(path: Path) -> str:
        """Such as "TGA-ZSR, Alpha 0.08, Beta 0.05, seed 0 (1f3a)"."""
        method, _, key = path.stem.rpartition("_seed")
        settings = read_metadata(path).get("settings", {})
        words = [method or path.stem]
        for name in ("Alpha", "Beta"):
            if "TGA" in method and settings.get(name) is not None:
                words.append(f"{name} {settings[name]:g}")
        return ", ".join([*words, f"seed {settings.get('seed', '?')} ({key[-4:]})"])

    def __getitem__(self, name: str) -> Clip:
        if name not in self._loaded:
            self._loaded[name] = load_alike(self.original, self._files[name])
            while len(self._loaded) > 5:
                del self._loaded[next(name for name in self._loaded if name != "original")]
        return self._loaded[name]

    def losses(self, name: str) -> dict[int, float]:
        """Step -> loss of a model's fine-tuning; empty if its file does not say, or if it has none."""
        file = self._files.get(name)
        about = read_metadata(file) if file and file.suffix == ".safetensors" else {}
        return {row["step"]: row["loss"] for row in about.get("history", [])}


class Panel:
    """Widgets: controls, the ``result`` they lead to and a ``status`` line."""

    title: str

    def __init__(self, *controls: widgets.Widget, height: int):
        self.result = widgets.HTML(layout=widgets.Layout(min_height=f"{height}px"))
        self.status = widgets.HTML(panels.sentence(""))
        children = [widgets.HTML(panels.STYLE), *controls, self.result, self.status]
        self.widget = widgets.VBox(children, layout=widgets.Layout(max_width="920px"))
        self.error: Exception | None = None

    def save(self, folder: Path, name: str) -> Path:
        """Writes ``<folder>/figures/<name>.html``, self-contained. Raises the error that the panel shows, if any."""
        if self.error is not None:
            raise self.error
        text = panels.document(self.result.value + self.status.value, self.title)
        path = folder / "figures" / f"{name}.html"
        return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = {} if os.environ.get(HEADLESS) else dict(self.widget._repr_mimebundle_(**options))
        shown = panels.STYLE + self.result.value + self.status.value  # all but the controls
        return bundle | {"text/html": shown, "text/plain": f"{self.title}: widgets, or HTML of their state"}

    def say(self, text: str, kind: str = "quiet") -> None:
        self.status.value = panels.sentence(text, kind)

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """What goes wrong within is said in the panel."""
        self.error = None
        try:
            yield
        except Exception as error:  # a panel stays usable whatever its input makes a library raise
            self.error = error
            self.say(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}", "error")


class Explorer:
    """Four panels that share Alpha, Beta and the models: ``mixer``, ``attack``, ``surface`` and ``trainer``.

    ``data``: images to attack; ``train``: those to fine-tune on, as ``training`` says but for what the widgets do;
    ``attack``: where epsilon and steps start; ``folder``: output folder with the table of notebook 03.
    """

    def __init__(
        self,
        models: Models,
        data: ImageSet,
        train: ImageSet,
        training: FinetuneSettings,
        attack: AttackSettings,
        folder: Path,
    ):
        self.models, self.data, self.train, self.training = models, data, train, training
        preset = TGA.with_preset(training)
        self.Alpha = weight_slider("Alpha", "weight of L_AR", preset.Alpha)
        self.Beta = weight_slider("Beta", "weight of L_AMC", preset.Beta)
        self.sliders = self.Alpha, self.Beta
        metrics, variants = ["l2", "l1", "cos"], ["reference", "cosine"]
        self.metric = control(widgets.Dropdown, "distance", 260, options=metrics, value=training.Distance_metric)
        self.variant = control(widgets.Dropdown, "attention", 260, options=variants, value=training.attention_variant)
        self.mixer, self.attack = LossMixer(self), AttackViewer(self, attack)
        self.surface, self.trainer = OutcomeSurface(self, folder), FineTuner(self)

    def finetuning(self) -> FinetuneSettings:
        """The settings of training with what the widgets say."""
        chosen = {"Alpha": self.Alpha.value, "Beta": self.Beta.value, "Distance_metric": self.metric.value}
        chosen |= {"attention_variant": self.variant.value}
        return TGA.with_preset(FinetuneSettings(**self.training.model_dump() | chosen))

    def update_model_choices(self) -> None:
        """Puts models that have come into being among the choices."""
        self.models.refresh()
        for choice in (self.mixer.model, self.attack.model):
            chosen = choice.value
            choice.options = self.models.names
            choice.value = chosen


class LossMixer(Panel):
    """What the loss terms of one batch come to, and how they pull on the weights, at each Alpha and Beta."""

    title = "The loss mixer"

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.terms: TermGradients | None = None
        self.model = control(widgets.Dropdown, "model", options=explorer.models.names, value=explorer.models.start)
        self.batch = control(widgets.BoundedIntText, "batch", 260, value=0, min=0, max=9999)
        reset = widgets.Button(description="published values", tooltip="put both sliders back")
        reset.layout.margin = BELOW_SLIDER
        marked = [widget for slider in explorer.sliders for widget in (slider, published_mark(slider))]
        left = widgets.VBox([*marked, reset])
        choices = [self.model, explorer.metric, explorer.variant, self.batch]
        super().__init__(side_by_side(left, widgets.VBox(choices)), height=170)
        on_change(explorer.sliders, self.redraw)
        on_change(choices, self.compute)
        reset.on_click(lambda _: self.reset())
        self.compute()

    def compute(self) -> None:
        """The terms anew; what an Alpha or Beta makes of them is ``redraw``'s."""
        self.say("computing …")
        with self.errors_shown():
            models, data, settings = self.explorer.models, self.explorer.train, self.explorer.finetuning()
            size = self.explorer.training.batch_size or 16
            rows = torch.arange(self.batch.value * size, (self.batch.value + 1) * size) % len(data)
            batch = next(data.batches([rows], models.original.device))
            clip = models[self.model.value]
            self.terms = term_gradients(clip, models.original, batch.images, batch.labels, data.prompts, settings)
            images = f"{len(batch.labels)} training images of {data.key}, {data.world}, batch {self.batch.value}"
            attack = f"attacked as in training (epsilon {settings.train_eps:g}/255)"
            self.say(f"model: {self.model.value}; {images}, {attack}")
            self.redraw()

    def redraw(self) -> None:
        if self.terms is not None:
            self.result.value = panels.mixture_html(self.terms, self.explorer.Alpha.value, self.explorer.Beta.value)

    def reset(self) -> None:
        for slider in self.explorer.sliders:
            slider.value = PRESET[slider.description]


class AttackViewer(Panel):
    """One image under attack: pixels, attention guided by any text, probabilities, and how far attention moves."""

    title = "Attention under attack"

    def __init__(self, explorer: Explorer, attack: AttackSettings):
        self.explorer = explorer
        self.own: Tensor | None = None  # an uploaded image [3,H,W]
        self.attacked: AttackedImage | None = None
        late = {"continuous_update": False}
        self.image = control(widgets.IntSlider, "image", min=0, max=len(explorer.data) - 1, value=0, **late)
        self.upload = widgets.FileUpload(accept="image/*", multiple=False, description="upload one")
        self.upload.tooltip, self.upload.layout.margin = "an image of your own", BELOW_SLIDER
        self.text = control(widgets.Text, "prompt", value="", placeholder="any text", **late)
        self.model = control(widgets.Dropdown, "model", options=explorer.models.names, value="original")
        eps, steps = attack.test_eps, attack.test_numsteps
        self.eps = control(widgets.FloatSlider, "epsilon (1/255)", min=0.0, max=16.0, step=0.25, value=eps, **late)
        self.steps = control(widgets.IntSlider, "steps", min=1, max=50, value=steps, **late)
        left = widgets.VBox([self.image, self.upload, self.text])
        super().__init__(side_by_side(left, widgets.VBox([self.model, self.eps, self.steps])), height=410)
        self._choose()
        on_change([self.image], self._choose)
        on_change([self.upload], self._take)
        on_change([self.text, self.model, self.eps, self.steps, explorer.variant], self.redraw)
        self.redraw()

    def _choose(self) -> None:
        """An image of the set, with its class's prompt."""
        self.own, self.upload.value = None, ()  # so that the same file can be uploaded again
        self._ask(int(self.explorer.data.labels[self.image.value]))

    def _ask(self, label: int) -> None:
        """Guides attention by the prompt of a class."""
        prompt = self.explorer.data.prompts[label]
        same, self.text.value = self.text.value == prompt, prompt
        if same:
            self.redraw()

    def _take(self) -> None:
        """The uploaded image, as the model takes it, with the prompt of what the original model sees in it."""
        with self.errors_shown():
            if self.upload.value:
                clip = self.explorer.models.original
                fitted = fit(_uploaded(self.upload.value[0]), clip.image_size[0], "crop")
                self.own = torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255
                with torch.no_grad():
                    logits = clip.logits(self.own[None].to(clip.device), clip.encode_text(self.explorer.data.prompts))
                self._ask(int(logits.argmax()))

    def redraw(self) -> None:
        with self.errors_shown():
            data, i, text = self.explorer.data, self.image.value, self.text.value
            if not text.strip():
                raise ValueError("the prompt is empty; attention needs a text that guides it")
            clip, variant = self.explorer.models[self.model.value], self.explorer.variant.value
            started = time.perf_counter()
            eps, steps = self.eps.value, self.steps.value
            image = i if self.own is None else self.own
            self.attacked = attack_image(clip, data, image, text, eps, steps, variant)
            self.result.value = panels.attacked_image_html(self.attacked)
            source = f"image {i} of {data.key}, {data.world}" if self.own is None else "your image"
            attack = f"PGD-{steps} at epsilon {eps:g}/255 with step epsilon/4"
            seconds = time.perf_counter() - started
            self.say(f"{source}; model: {self.model.value}; attention for “{text}”; {attack}; {seconds:.2f} s")


def _uploaded(file: Mapping[str, Any]) -> Image.Image:
    try:
        return read_rgb(io.BytesIO(bytes(file["content"])))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ValueError(f"This is not an image I can read: {file['name']}{reason}") from None


class OutcomeSurface(Panel):
    """What was measured over Alpha and Beta, and where the sliders are among it."""

    title = "Accuracy over Alpha and Beta"

    def __init__(self, explorer: Explorer, folder: Path):
        self.explorer = explorer
        self.sweep, self.source = recorded_sweep(folder, explorer.data.world)
        super().__init__(side_by_side(*explorer.sliders), height=20 if self.sweep is None else 250)
        on_change(explorer.sliders, self.redraw)
        self.redraw()

    def redraw(self) -> None:
        if self.sweep is None:
            return self.say(self.source)
        a, b = self.explorer.Alpha.value, self.explorer.Beta.value
        near = nearest_measured(self.sweep, a, b)
        self.result.value = panels.block(panels.sweep_svg(self.sweep, a, b))
        found = ", ".join(f"{kind} {near[kind]:.1f} ± {near[f'{kind}_ci']:.1f}" for kind in KINDS)
        nearest = f"nearest measured, outlined: ({near.Alpha:g}, {near.Beta:g}): {found} ({self.source})"
        self.say(f"Sliders at ({a:g}, {b:g}), the ring; {nearest}. Nothing between is measured.")


class FineTuner(Panel):
    """Fine-tunes the original model at the sliders' Alpha and Beta in the background; the kernel stays free.

    Until it does, it shows how the kept model was trained.
    """

    title = "Fine-tuning"

    def __init__(self, explorer: Explorer):
        self.explorer = explorer
        self.start = widgets.Button(description="Fine-tune", tooltip="train TGA-ZSR at this Alpha and Beta")
        self.start.button_style = "primary"
        self.stop = widgets.Button(description="Cancel", tooltip="stop after the current step", disabled=True)
        self.bar = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(width="300px"))
        self.losses: dict[int, float] = {}  # of the steps of this run that were seen
        self.thread: threading.Thread | None = None
        self._cancelled, self._guard = threading.Event(), threading.Lock()
        self.start.on_click(lambda _: self.begin())
        self.stop.on_click(lambda _: self.cancel())
        run = widgets.HBox([self.start, self.stop, self.bar])
        super().__init__(side_by_side(*explorer.sliders), run, height=130)
        kept = explorer.models.losses(explorer.models.start)
        self._draw(kept, len(kept))
        shown = "Shown: how the tuned model was trained. " if kept else ""
        images = f"{len(explorer.train)} images of {explorer.train.key}, {explorer.training.epochs} epoch(s)"
        self.say(f"{shown}The button tunes on {images}; the model then joins the choices above")

    def begin(self) -> None:
        """Starts a run, unless one is under way."""
        with self._guard:
            if self.thread is not None and self.thread.is_alive():
                return
            self.start.disabled, self.stop.disabled = True, False
            self.losses.clear()
            self._cancelled.clear()
            self.thread = threading.Thread(target=self._run, args=(self.explorer.finetuning(),), daemon=True)
            self.thread.start()

    def cancel(self) -> None:
        self._cancelled.set()
        self.stop.disabled = True
        self.say("stopping after this step …")

    def _run(self, settings: FinetuneSettings) -> None:
        run, models = f"TGA-ZSR at Alpha {settings.Alpha:g}, Beta {settings.Beta:g}", self.explorer.models
        self.say(f"{run}: starting …")
        try:
            with self.errors_shown():
                what = models.original, self.explorer.train, TGA, settings, models.run.stored_models
                tuned = finetune(*what, stop=self._cancelled.is_set, watch=self._watch)
                models.run.show(tuned.weights)
                self.explorer.update_model_choices()
                self.bar.value = self.bar.max
                self.say(f"{run} is trained: “{models.name_of(tuned.weights)}” is among the models now")
        except KeyboardInterrupt:
            done = f"after step {self.bar.value} of {self.bar.max}"
            self.say(f"{run} was cancelled {done}; the same button goes on from there")
        finally:
            self.start.disabled, self.stop.disabled = False, True

    def _watch(self, done: int, total: int, row: Mapping[str, float]) -> None:
        """After each step."""
        self.losses[done - 1] = row["loss"]
        self.bar.max, self.bar.value = total, done
        if done % 5 == 0 or done == total or len(self.losses) == 1:
            self._draw(self.losses, total)
            self.say(f"step {done} of {total}: " + ", ".join(f"{name} {row[name]:.3f}" for name in ("loss", *TERMS)))

    def _draw(self, losses: Mapping[int, float], total: int) -> None:
        self.result.value = panels.block(panels.curve_svg(losses, total))


def control(widget: type[widgets.Widget], description: str, width: int = 405, **options: Any) -> widgets.Widget:
    """A widget of ``width`` pixels with its description before it, in line with the others."""
    layout, style = widgets.Layout(width=f"{width}px"), {"description_width": "104px"}
    return widget(description=description, style=style, layout=layout, **options)


def weight_slider(name: str, meaning: str, value: float) -> widgets.FloatSlider:
    form = {"min": 0.0, "max": 0.4, "step": 0.005, "readout_format": ".3f"}
    return control(widgets.FloatSlider, name, value=value, tooltip=meaning, **form)


def published_mark(slider: widgets.FloatSlider) -> widgets.HTML:
    """A line below a slider that says where on its track, between description and readout, the published value is."""
    value = PRESET[slider.description]
    at = 113 + 205 * (value - slider.min) / (slider.max - slider.min)
    words = panels.block(f'<div style="padding-left:{at:.0f}px" class="quiet">▲ {value:g} published</div>')
    return widgets.HTML(words, layout=widgets.Layout(height="22px"))


def side_by_side(*parts: widgets.Widget) -> widgets.HBox:
    """Below each other where the page is narrow."""
    return widgets.HBox(parts, layout=widgets.Layout(flex_flow="row wrap"))


def on_change(controls: Iterable[widgets.Widget], action: Callable[[], None]) -> None:
    for each in controls:
        each.observe(lambda _: action(), "value")
