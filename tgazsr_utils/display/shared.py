"""What the explorer's panels share: models, images, Alpha and Beta."""

from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import PRESET
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.display.controls import control, weight_slider
from tgazsr_utils.measuring.loss_mixture import TGA
from tgazsr_utils.measuring.tried import Outcome, Tried
from tgazsr_utils.runtime.fingerprints import fingerprint
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import load_alike, read_metadata

PUBLISHED = PRESET["Alpha"], PRESET["Beta"]


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

    def about(self, name: str) -> dict:
        """What a model's file says of its fine-tuning; empty if it does not say, or if it has none."""
        file = self._files.get(name)
        return read_metadata(file) if file and file.suffix == ".safetensors" else {}


class Shared:
    """What moves in one panel and shows in others."""

    def __init__(
        self, models: Models, data: ImageSet, train: ImageSet, training: FinetuneSettings, attack: AttackSettings
    ):
        self.models, self.data, self.train, self.training = models, data, train, training
        preset = TGA.with_preset(training)
        self.Alpha = weight_slider("Alpha", "weight of L_AR", preset.Alpha)
        self.Beta = weight_slider("Beta", "weight of L_AMC", preset.Beta)
        self.sliders = self.Alpha, self.Beta
        metrics, variants = ["l2", "l1", "cos"], ["reference", "cosine"]
        self.metric = control(widgets.Dropdown, "distance", 240, options=metrics, value=training.Distance_metric)
        self.variant = control(widgets.Dropdown, "attention", 240, options=variants, value=training.attention_variant)
        like_the_panel = {"attack": "pgd", "norm": "linf", "attack_precision": "model"}
        like_the_panel |= {"test_stepsize": attack.test_eps / 4}
        self.tried = Tried(models.run, data, attack.model_copy(update=like_the_panel))
        self.model_choices: list[widgets.Dropdown] = []
        self.on_outcome: list[Callable[[], None]] = []

    @property
    def measured_on(self) -> str:
        """Such as "100 held-out images"; a folder without a split of its own may leave none to hold out."""
        n, of = len(self.tried.data), f"images of {self.data.key}"
        return f"{n} {of}, tuned on too" if fingerprint(self.data) == fingerprint(self.train) else f"{n} held-out {of}"

    def finetuning(self) -> FinetuneSettings:
        """The settings of training with what the widgets say."""
        chosen = {"Alpha": self.Alpha.value, "Beta": self.Beta.value, "Distance_metric": self.metric.value}
        chosen |= {"attention_variant": self.variant.value}
        return TGA.with_preset(FinetuneSettings(**self.training.model_dump() | chosen))

    def choice_of_model(self, description: str, value: str, *more: str) -> widgets.Dropdown:
        """One that models join when they come into being; ``more``: what else there is to choose, first."""
        choice = control(widgets.Dropdown, description, 440, options=[*more, *self.models.names], value=value)
        self.model_choices.append(choice)
        return choice

    def update_model_choices(self) -> None:
        """Puts models that have come into being among the choices."""
        known = set(self.models.names)
        self.models.refresh()
        new = [name for name in self.models.names if name not in known]
        for choice in self.model_choices:
            chosen = choice.value
            choice.options = [*choice.options, *new]
            choice.value = chosen

    def outcomes(self) -> list[Outcome]:
        """What was tried with these settings but for Alpha and Beta."""
        return self.tried.alike(self.finetuning(), self.train)
