"""The explorer's panel of one image under attack, before two models at once."""

import io
import time
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tgazsr_utils.core.settings import AttackSettings
from tgazsr_utils.datasets.decoding import read_rgb
from tgazsr_utils.datasets.files import fit
from tgazsr_utils.display import panels
from tgazsr_utils.display.controls import BELOW_SLIDER, Panel, control, on_change, side_by_side
from tgazsr_utils.display.shared import Shared
from tgazsr_utils.measuring.attacked_image import AttackedImage, Question, attack_image, never_read

NO_OTHER = "no other"
FRAME = 1200  # milliseconds between two epsilons that are played


class AttackViewer(Panel):
    """One image under attack before two models: pixels, attention guided by any text, answers among any labels."""

    title = "Attention under attack"
    hint = (
        "press ▶ and watch which model’s answer goes first; hold the pointer over an attacked picture to see it as it "
        "was; upload a picture and ask it something else than the set’s classes."
    )

    def __init__(self, explorer: Shared, attack: AttackSettings):
        self.explorer = explorer
        self.own: Tensor | None = None  # an uploaded image [3,H,W]
        self.attacked: dict[str, AttackedImage] = {}  # by model
        self._held = False  # do changes wait for others?
        late = {"continuous_update": False}
        self.image = control(widgets.IntSlider, "image", min=0, max=len(explorer.data) - 1, value=0, **late)
        self.upload = widgets.FileUpload(accept="image/*", multiple=False, description="upload one")
        self.upload.tooltip = "an image of your own"
        self.back = widgets.Button(description="back to the set", disabled=True)
        names = ", ".join(explorer.data.class_names)
        self.labels = control(
            widgets.Textarea, "labels", value=names, placeholder="labels, with commas", rows=3, **late
        )
        self.text = control(widgets.Text, "prompt", value="", placeholder="any text", **late)
        self.model = explorer.choice_of_model("model", "original")
        tuned = explorer.models.start
        self.other = explorer.choice_of_model("beside it", NO_OTHER if tuned == "original" else tuned, NO_OTHER)
        eps, steps = attack.test_eps, attack.test_numsteps
        self.eps = control(widgets.FloatSlider, "epsilon/255", min=0.0, max=16.0, step=0.25, value=eps, **late)
        self.play = widgets.Play(min=0, max=16, step=1, interval=FRAME, description="play epsilon")
        self.flip = widgets.ToggleButton(description="flip to clean", tooltip="attacked pictures as they were before")
        self.steps = control(widgets.IntSlider, "steps", min=1, max=50, value=steps, **late)
        below = widgets.Layout(margin=BELOW_SLIDER)
        left = [self.image, widgets.HBox([self.upload, self.back], layout=below), self.labels, self.text]
        right = [self.model, self.other, self.eps, widgets.HBox([self.play, self.flip], layout=below), self.steps]
        super().__init__(side_by_side(widgets.VBox(left), widgets.VBox(right)), height=560)
        self._choose()
        on_change([self.image], self._choose)
        self.back.on_click(lambda _: self._choose())
        on_change([self.upload], self._take)
        on_change([self.labels], self._ask_again)
        on_change([self.text, self.model, self.other, self.eps, self.steps, explorer.variant], self.redraw)
        on_change([self.play], self._played)
        on_change([self.eps], lambda: setattr(self.play, "value", round(self.eps.value)))  # where playing goes on
        self.flip.observe(lambda change: self._flip(change["new"]), "value")

    def _played(self) -> None:
        if self.play.value != round(self.eps.value):
            self.eps.value = float(self.play.value)

    def _flip(self, to_clean: bool) -> None:
        (self.result.add_class if to_clean else self.result.remove_class)("tga-flip")

    def question(self) -> Question:
        """The labels that are asked for. Raises ValueError if there are none."""
        if self.labels.value == ", ".join(self.explorer.data.class_names):
            return Question.of(self.explorer.data)  # also where a name has a comma
        labels = [label.strip() for label in self.labels.value.replace("\n", ",").split(",")]
        if not any(labels):
            raise ValueError("there are no labels to choose from; give some, with commas between them")
        return Question.of(self.explorer.data, list(dict.fromkeys(filter(None, labels))))

    def _choose(self) -> None:
        """An image of the set, asked for the set's classes, with the prompt of its own."""
        self._held = True
        self.own, self.upload.value = None, ()  # so that the same file can be uploaded again
        self.back.disabled = True
        self.labels.value = ", ".join(self.explorer.data.class_names)
        self.text.value = self.explorer.data.prompts[int(self.explorer.data.labels[self.image.value])]
        self._held = False
        self.redraw()

    def _take(self) -> None:
        """The uploaded image, as the model takes it."""
        with self.at_work():
            if self.upload.value:
                side = self.explorer.models.original.image_size[0]
                fitted = fit(_uploaded(self.upload.value[0]), side, "crop")
                self.own = torch.from_numpy(np.array(fitted)).permute(2, 0, 1) / 255
                self.back.disabled = False
                self._ask_again()

    def _ask_again(self) -> None:
        """Of one's own image: the prompt becomes that of what the original model sees in it among the labels."""
        if self._held:
            return
        with self.at_work():
            question, clip = self.question(), self.explorer.models.original
            if self.own is not None:
                with torch.no_grad():
                    logits = clip.logits(self.own[None].to(clip.device), clip.encode_text(question.prompts))
                self._held = True
                self.text.value = question.prompts[int(logits.argmax())]
        self._held = False
        if self.error is None:
            self.redraw()

    def redraw(self) -> None:
        if self._held:
            return
        with self.at_work(dimmed=True):
            data, i, text = self.explorer.data, self.image.value, self.text.value
            if not text.strip():
                raise ValueError("the prompt is empty; attention needs a text that guides it")
            question, started = self.question(), time.perf_counter()
            options = text, self.eps.value, self.steps.value, self.explorer.variant.value, question
            names = [name for name in dict.fromkeys((self.model.value, self.other.value)) if name != NO_OTHER]
            image = i if self.own is None else self.own
            self.attacked = {n: attack_image(self.explorer.models[n], data, image, *options) for n in names}
            self.result.value = panels.attacked_html(self.attacked)
            self._say_what(question, time.perf_counter() - started)

    def _say_what(self, question: Question, seconds: float) -> None:
        data, eps = self.explorer.data, self.eps.value
        source = f"image {self.image.value} of {data.key}, {data.world}" if self.own is None else "your image"
        attack = f"PGD-{self.steps.value} at epsilon {eps:g}/255 with step epsilon/4, against each model by itself"
        told = f"{source}; attention for “{self.text.value}”; {attack}; {seconds:.2f} s"
        if unread := never_read(self.explorer.models.original, data, question.labels):
            words = ", ".join(f"“{word}”" for word in unread[:8])
            told += f". This small CLIP has read no caption with {words}: what it says of such a label means nothing"
        self.say(told)


def _uploaded(file: Mapping[str, Any]) -> Image.Image:
    try:
        return read_rgb(io.BytesIO(bytes(file["content"])))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ValueError(f"This is not an image I can read: {file['name']}{reason}") from None
