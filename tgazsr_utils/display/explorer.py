"""The explorer: what Alpha and Beta do to the loss, and where attention goes under attack, as panels of widgets.

What a panel shows is drawn by ``display.panels``; the same HTML is its output where no widget can be shown.
"""

import threading
from collections.abc import Mapping
from pathlib import Path

import ipywidgets as widgets
import torch

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.objectives import PRESET
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.display import panels
from tgazsr_utils.display.attack_viewer import AttackViewer
from tgazsr_utils.display.controls import BELOW_SLIDER, Panel, control, on_change, published_mark, side_by_side
from tgazsr_utils.display.shared import PUBLISHED, Models, Shared
from tgazsr_utils.measuring.loss_mixture import TERMS, TGA, TermGradients, term_gradients
from tgazsr_utils.measuring.recorded_sweep import KINDS, nearest_measured, recorded_sweep
from tgazsr_utils.measuring.tables import number_of
from tgazsr_utils.measuring.tried import Outcome, verdict
from tgazsr_utils.runtime.checkpoints import Checkpoints
from tgazsr_utils.runtime.files import DamagedFile, load_tensors
from tgazsr_utils.runtime.finetuning import finetune, tuned_path

__all__ = ["Explorer", "Models"]


class Explorer(Shared):
    """Four panels that share Alpha, Beta and the models: ``mixer``, ``attack``, ``surface`` and ``trainer``.

    ``data``: images to attack, and to measure what is tuned; ``train``: those to fine-tune on, as ``training`` says but
    for what the widgets do; ``attack``: where epsilon and steps start; ``folder``: output folder with the table of
    notebook 03.
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
        super().__init__(models, data, train, training, attack)
        self.mixer, self.attack = LossMixer(self), AttackViewer(self, attack)
        self.surface, self.trainer = OutcomeSurface(self, folder), FineTuner(self)


class LossMixer(Panel):
    """What the loss terms of one batch come to, and how they pull on the weights, at each Alpha and Beta."""

    title = "The loss mixer"
    hint = "move Alpha until L_AR is half of the loss, and see in the matrix what its gradient does to that of CE."

    def __init__(self, explorer: Shared):
        self.explorer = explorer
        self.terms: TermGradients | None = None
        self.model = explorer.choice_of_model("model", explorer.models.start)
        self.batch = control(widgets.BoundedIntText, "batch", 240, value=0, min=0, max=9999)
        reset = widgets.Button(description="published values", tooltip="put both sliders back")
        reset.layout.margin = BELOW_SLIDER
        marked = [widget for slider in explorer.sliders for widget in (slider, published_mark(slider))]
        left = widgets.VBox([*marked, reset])
        choices = [self.model, explorer.metric, explorer.variant, self.batch]
        super().__init__(side_by_side(left, widgets.VBox(choices)), height=190)
        on_change(explorer.sliders, self.redraw)
        on_change(choices, self.compute)
        reset.on_click(lambda _: self.reset())
        self.compute()

    def compute(self) -> None:
        """The terms anew; what an Alpha or Beta makes of them is ``redraw``'s."""
        with self.at_work(dimmed=True):
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
        with self.at_work():
            if self.terms is not None:
                place = (slider.value for slider in self.explorer.sliders)
                self.result.value = panels.mixture_html(self.terms, *place)

    def reset(self) -> None:
        for slider in self.explorer.sliders:
            slider.value = PRESET[slider.description]


class OutcomeSurface(Panel):
    """What was measured over Alpha and Beta, where the sliders are among it, and what was tried by hand."""

    title = "Accuracy over Alpha and Beta"
    hint = "put the ring where nothing is measured, fine-tune there below, and a star stays on the map."

    def __init__(self, explorer: Shared, folder: Path):
        self.explorer = explorer
        self.sweep, self.source = recorded_sweep(folder, explorer.data.world)
        super().__init__(side_by_side(*explorer.sliders), height=20 if self.sweep is None else 290)
        on_change(explorer.sliders, self.redraw)
        on_change([explorer.metric, explorer.variant], self.read)
        explorer.on_outcome.append(self.read)
        self.tried: list[Outcome] = []
        self.read()

    def read(self) -> None:
        """What was tried, anew from the run's folder."""
        with self.at_work():
            self.tried = self.explorer.outcomes()
        if self.error is None:
            self.redraw()

    def redraw(self) -> None:
        with self.at_work():
            a, b = (slider.value for slider in self.explorer.sliders)
            shown, words = "", f"{self.source}. "
            if self.sweep is not None:
                near = nearest_measured(self.sweep, a, b)
                found = ", ".join(f"{kind} {near[kind]:.1f} ± {near[f'{kind}_ci']:.1f}" for kind in KINDS)
                nearest = f"nearest measured, outlined: ({near.Alpha:g}, {near.Beta:g}): {found} ({self.source})"
                words = f"The ring is at Alpha {a:g}, Beta {b:g}; {nearest}. Nothing between is measured."
                shown = panels.says(self._in_words(near)) + panels.sweep_svg(self.sweep, a, b, self.tried)
            if self.tried:
                images = f"{len(self.explorer.train)} images and measured on {self.explorer.measured_on}"
                words += f" Stars, and the table: tuned here on {images}, {self.tried[0].robust.attack.upper()}"
                words += "; cells are means over the sets of notebook 03, so compare stars with stars."
            self.result.value = panels.block(shown + panels.tried_html(self.tried, PUBLISHED))
            self.say(words)

    def _in_words(self, near: Mapping[str, float]) -> str:
        best = self.sweep.loc[self.sweep.average.idxmax()]
        behind = best.average - near["average"]
        place = f"({near['Alpha']:g}, {near['Beta']:g})"
        if near["Alpha"] == best.Alpha and near["Beta"] == best.Beta:
            return f"The ring is nearest to {place}, which has the best average of those measured."
        sure = "within" if behind < near["average_ci"] else "beyond"
        words = f"The ring is nearest to {place}: {behind:.1f} points of average below the best"
        return f"{words}, ({best.Alpha:g}, {best.Beta:g}), {sure} its own interval."


class FineTuner(Panel):
    """Fine-tunes the original model at the sliders' Alpha and Beta in the background, and measures what comes of it.

    So it does with the published Alpha and Beta, once, to compare with; the kernel stays free. Until then it shows how
    the kept model was trained.
    """

    title = "Fine-tuning"
    hint = "take Alpha to a place where no star is, press the button, and read what it was worth against the published."

    def __init__(self, explorer: Shared):
        self.explorer = explorer
        self.start = widgets.Button(description="Fine-tune", tooltip="train TGA-ZSR at this Alpha and Beta")
        self.start.button_style = "primary"
        self.stop = widgets.Button(description="Cancel", tooltip="stop after the current step", disabled=True)
        self.bar = widgets.IntProgress(value=0, min=0, max=1, layout=widgets.Layout(width="300px"))
        self.history: list[Mapping[str, float]] = []  # a row a step, also those of a run that this one goes on with
        self.place = PUBLISHED  # its Alpha and Beta
        self.words = ""  # what came of it
        self.outcome: Outcome | None = None
        self.thread: threading.Thread | None = None
        self._cancelled, self._guard = threading.Event(), threading.Lock()
        self.start.on_click(lambda _: self.begin())
        self.stop.on_click(lambda _: self.cancel())
        run = widgets.HBox([self.start, self.stop, self.bar])
        super().__init__(side_by_side(*explorer.sliders), run, height=220)
        about = explorer.models.about(explorer.models.start)
        self.history, settings = about.get("history", []), about.get("settings", {})
        self.place = tuple(settings.get(name) or 0.0 for name in ("Alpha", "Beta"))
        self._draw(len(self.history))
        a, b = self.place
        shown = f"Shown: how the tuned model was trained, Alpha {a:g}, Beta {b:g}. " if self.history else ""
        images = f"{len(explorer.train)} images of {explorer.train.key}, {number_of(explorer.training.epochs, 'epoch')}"
        self.say(f"{shown}Fine-tuning here takes {images}, and ends in a measurement on {explorer.measured_on}")

    def begin(self) -> None:
        """Starts a run, unless one is under way."""
        with self._guard:
            if self.thread is not None and self.thread.is_alive():
                return
            self.start.disabled, self.stop.disabled = True, False
            self._cancelled.clear()
            self.thread = threading.Thread(target=self._run, args=(self.explorer.finetuning(),), daemon=True)
            self.thread.start()

    def cancel(self) -> None:
        self._cancelled.set()
        self.stop.disabled = True
        self.say("stopping after this step …")

    def _run(self, settings: FinetuneSettings) -> None:
        try:
            with self.at_work():
                self.words = ""
                self.outcome = own = self._tried(settings)
                shown = self.history, self.place
                if own.place == PUBLISHED:
                    self._tell(f"At the published setting, in percent: {own}.", *shown)
                else:
                    self._tell(f"Yours, in percent: {own}.", *shown)
                    at = {"Alpha": PUBLISHED[0], "Beta": PUBLISHED[1]}
                    published = self._tried(settings.model_copy(update=at))
                    words = f"Yours {own}, published setting {published}, in percent; {verdict(own, published)}."
                    self._tell(words, *shown)
                self.say(f"{self._measured()}; the model is among those to choose from, its star on the map")
        except KeyboardInterrupt:
            done = f"after step {self.bar.value} of {self.bar.max}"
            self.say(f"cancelled {done}; the same button goes on from there")
        finally:
            self.start.disabled, self.stop.disabled = False, True

    def _tried(self, settings: FinetuneSettings) -> Outcome:
        """Tunes and measures, as far as that is not done. Raises KeyboardInterrupt when cancelled."""
        name, models = f"TGA-ZSR at Alpha {settings.Alpha:g}, Beta {settings.Beta:g}", self.explorer.models
        self.say(f"{name}: starting …")
        what = self.explorer.train, TGA, settings, models.run.stored_models
        weights = tuned_path(what[-1], TGA, settings, self.explorer.train, models.original)
        self.history, self.place = _before(weights), (settings.Alpha, settings.Beta)
        tuned = finetune(models.original, *what, stop=self._cancelled.is_set, watch=self._watch)
        self.history = tuned.history.to_dict("records")
        self._draw(len(self.history))
        models.run.show(tuned.weights)
        self.explorer.update_model_choices()
        self.say(f"{name} is trained: “{models.name_of(tuned.weights)}” is among the models now; measuring it …")
        outcome = self.explorer.tried.measure(tuned.clip, settings.seed, self._watch_measuring)
        for changed in self.explorer.on_outcome:
            changed()
        return outcome

    def _measured(self) -> str:
        tried = self.explorer.tried
        attack = f"{tried.attack.label.upper()} at epsilon {tried.attack.test_eps:g}/255, step epsilon/4"
        return f"Measured on {self.explorer.measured_on}, clean and under {attack}"

    def _tell(self, words: str, history: list[Mapping[str, float]], place: tuple[float, float]) -> None:
        """The outcome as the panel's sentence, above the curve of the run that led to it."""
        self.words, self.history, self.place = words, history, place
        self._draw(len(history))

    def _watch(self, done: int, total: int, row: Mapping[str, float]) -> None:
        """After each step."""
        self.history.append(row)
        self.bar.max, self.bar.value = total, done
        if done % 5 == 0 or done == total or len(self.history) == 1:
            self._draw(total)
            self.say(f"step {done} of {total}: " + ", ".join(f"{name} {row[name]:.3f}" for name in ("loss", *TERMS)))

    def _watch_measuring(self, done: int, total: int) -> None:
        """After some images; what is not measured in full is measured anew."""
        self.bar.max, self.bar.value = total, done
        self.say(f"measured {done} of {total} images, half of them attacked")
        if self._cancelled.is_set():
            raise KeyboardInterrupt

    def _draw(self, total: int) -> None:
        curves = panels.curves_svg(self.history, self.place, total) if total else ""
        self.result.value = panels.block((panels.says(self.words) if self.words else "") + curves)


def _before(weights: Path) -> list[Mapping[str, float]]:
    """A row for each step that an unfinished training goes on from."""
    checkpoints = Checkpoints(weights.with_suffix(""))
    newest = checkpoints.newest()
    if newest is None or weights.exists():
        return []
    try:
        return list(load_tensors(newest, run=checkpoints.run.name)[1]["state"]["history"])
    except DamagedFile:  # which is told, and not used, where training goes on
        return []
