"""What each notebook takes: names, units, ranges. Whatever papermill injects is checked here first."""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from tgazsr_utils.core.attacks import check_guarded
from tgazsr_utils.core.images import PLUMBING
from tgazsr_utils.core.settings import (
    ADDED_ATTACKS,
    AttackSettings,
    Count,
    Eps255,
    FinetuneSettings,
    Fraction,
    Length255,
    Natural,
    NonNegative,
    Number,
    Positive,
    Precision,
    Protocol,
    Settings,
    exact_name,
)
from tgazsr_utils.measuring.ablations import ABLATIONS
from tgazsr_utils.paths import DATA, resolve
from tgazsr_utils.runtime.plugins import PluginSettings
from tgazsr_utils.runtime.processes import that_suit
from tgazsr_utils.strict_yaml import YAML_ERRORS, load_yaml

Item = TypeVar("Item")


def _distinct(values: list[Item]) -> list[Item]:
    if len(set(values)) < len(values):
        raise ValueError("an entry is there twice")
    return values


ORIGINAL = "CLIP"  # how tables call the untuned model
TRANSFER = "transfer"  # among other attacks: PGD on each of the run's other models, whose images a model then reads


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("a label is empty")
    return value


def _other_attack(value: str) -> str:
    known = [*get_args(AttackSettings.model_fields["attack"].annotation), *sorted(ADDED_ATTACKS), TRANSFER]
    if (name := value if value in ADDED_ATTACKS else exact_name(value)) not in known:
        raise ValueError(f"should be one of {', '.join(known)}")
    return name


Distinct = Annotated[list[Item], Field(min_length=1), AfterValidator(_distinct)]
Labels = Annotated[Distinct[Annotated[str, AfterValidator(_not_blank)]], BeforeValidator(_listed)]  # or "dog, teapot"


class SettingsError(ValueError):
    """One line that names the value and says what is allowed."""

    def __init__(self, text: str):
        line = " ".join(text.split())  # one line, whatever a name or value is
        super().__init__(line if len(line) <= 1900 else f"{line[:900]} ... {line[-900:]}")


def _or_chosen_rates(value: Any) -> Any:
    """``overrides``, or the learning rates that were chosen for the mini-world."""
    if value is not None:
        return value
    rates = load_yaml((DATA / "learning_rates.yaml").read_text(encoding="utf-8"))
    return {method: {"lr": rate} for method, rate in rates.items()}


class WorkbookSettings(Settings):
    """What every notebook knows."""

    arch: str  # an open_clip architecture with patch tokens
    data_root: str | None  # folder of image sets; None: the rendered mini-world
    preprocess: Literal["resize", "crop"] | None = None  # None: each set's own
    prompt: str | None = None  # template such as "A photo of a {}."; None: each set's own
    test_fraction: Fraction | None = None  # of sets without a split; 1: all, to tune on as well; None: a fifth
    on_bad_image: Literal["stop", "leave_out"] = "stop"  # what to do about a file that cannot be read
    output: str | None  # folder of the run; None: one below runs/, named after what differs from the defaults
    device: str = "auto"  # "auto", "cpu", "cuda" or "cuda:N"
    seed: Natural  # of all that is random

    @field_validator("data_root", "output", "weights", "pretrained", "tuned", "descriptions", check_fields=False)
    @classmethod
    def _can_be_a_path(cls, value: str | None) -> str | None:
        if value is not None:
            resolve(value)
        return value

    @field_validator("data_root")
    @classmethod
    def _is_there(cls, value: str | None) -> str | None:
        if value is not None and not resolve(value).is_dir():
            raise ValueError(
                f"there is no such folder ({resolve(value)}); name that of your image sets with -p data_root FOLDER "
                "(python -m tgazsr_utils.datasets fetch gets the published ones)"
            )
        return value

    @field_validator("prompt")
    @classmethod
    def _has_a_place(cls, value: str | None) -> str | None:
        if value is not None and value.count("{}") != 1:
            raise ValueError("a prompt template has one {}, where the class name goes")
        return value

    @model_validator(mode="after")
    def _files_have_a_root(self) -> "WorkbookSettings":
        for name, usual in (("preprocess", None), ("test_fraction", None), ("on_bad_image", "stop")):
            if self.data_root is None and (value := getattr(self, name)) != usual:
                raise ValueError(f"{name} = {value!r} is for image files; the mini-world (data_root None) has none")
        return self

    @property
    def data_options(self) -> dict[str, Any]:
        """How ``load_dataset`` is to read sets."""
        names = {"preprocess", "prompt", "test_fraction", "on_bad_image"}
        return self.model_dump(include=names) | {"root": self.data_root}

    def only(self, model: "type[AnySettings]", **changes: Any) -> "AnySettings":
        """The part of these settings that ``model`` knows and that were given, perhaps with changes."""
        given = self.model_fields_set & set(model.model_fields)
        return validate(model, {name: getattr(self, name) for name in given} | changes)


class ModelSettings(WorkbookSettings, PluginSettings):
    """What every notebook knows that starts from a pre-trained model."""

    pretrained: str | None  # "mini", an open_clip tag, a file, "latest:pretrained" in the output folder; None: random
    image_size: Count | None = None  # side in pixels; None: the architecture's own
    precision: Precision = "auto"  # of the image encoder; "auto": "amp_bf16" on CUDA, else "fp32"
    compiled: bool | None = None  # through torch.compile; None: on CUDA

    @property
    def model_options(self) -> dict[str, Any]:
        """How ``load_clip`` is to make models."""
        return self.model_dump(include={"device", "precision", "image_size", "compiled"})

    @property
    def data_options(self) -> dict[str, Any]:
        return super().data_options | {"world": PLUMBING if self.pretrained is None else None}


class PretrainNotebook(WorkbookSettings):
    sets: list[str] | None  # image sets under data_root to learn from; None: all (or the mini-world)
    steps: Count  # of pre-training
    batch_size: Count
    lr: Positive
    warmup_steps: Natural
    weight_decay: NonNegative
    test_images: Count  # a set
    weights: str | None  # file to write; None: in the output folder
    weights_precision: Literal["fp32", "fp16"]  # of the written file
    eps_candidates: Annotated[list[Eps255], Field(min_length=1)]  # attack strengths to try, 1/255
    test_numsteps: Count

    @model_validator(mode="after")
    def _sets_have_a_root(self) -> "PretrainNotebook":
        if self.sets is not None and self.data_root is None:
            raise ValueError("sets are folders of data_root, which is not given")
        return self


class CandidateSettings(ModelSettings):
    """What the notebooks know that look at single images."""

    labels: Labels | None = None  # classes to choose from besides the set's own, such as [dog, teapot]
    tuned: str | None  # model beside: "mini-tga-zsr", a file, or "latest:METHOD" in the output folder; None: none


class AttentionShiftNotebook(CandidateSettings, AttackSettings):
    dataset: str
    test_images: Count
    shown_images: Annotated[int, Number, Field(ge=1, le=12)]  # in the figure
    eps_list: Annotated[list[Eps255], Field(min_length=1)]  # 1/255, of the curves
    attention_variant: Literal["reference", "cosine"]


class TrainNotebook(ModelSettings, FinetuneSettings, AttackSettings):
    dataset: str  # the one set that is tuned on
    train_images: Count | None  # None: all (the mini-world renders 1000)
    test_images: Count | None  # of each test set; None: all
    methods: Distinct[str]  # that are trained
    descriptions: str | None = None  # JSON file, class -> texts, for SAFT; None: the mini-world's own
    # method -> parameters of fine-tuning that differ for it; None: the mini-world's learning rates
    overrides: Annotated[dict[str, dict[str, Any]], BeforeValidator(_or_chosen_rates)] = {}
    processes: Count | Literal["auto"] = 1  # that train and measure together, each on its device; "auto": as suits
    check_images: Natural = 16  # about so many check the attack once a model (measuring.trust); 0: none

    @property
    def model_options(self) -> dict[str, Any]:
        return super().model_options | {"waiting": self.number_of_processes > 1}

    @property
    def number_of_processes(self) -> int:
        return that_suit(self.device) if self.processes == "auto" else self.processes

    @model_validator(mode="after")
    def _devices_are_shared_out(self) -> "TrainNotebook":
        if self.processes not in (1, "auto") and self.device not in ("auto", "cuda"):
            raise ValueError(
                f"device = {self.device!r}: each of several processes takes a device of its own; 'auto', or 'cuda'"
            )
        return self

    @model_validator(mode="after")
    def _overrides_are_settings(self) -> "TrainNotebook":
        for method, changes in self.overrides.items():
            try:
                if "seed" in changes:
                    raise SettingsError("the seed is one for all methods")
                self.finetuning(method)
            except SettingsError as error:
                raise ValueError(f"overrides of {method}: {error}") from None
        return self

    def finetuning(self, method: str, **changes: Any) -> FinetuneSettings:
        """How a method is trained: these settings, its overrides, then ``changes``."""
        return self.only(FinetuneSettings, **self.overrides.get(method, {}) | changes)


class MeasureSettings(TrainNotebook):
    """What the notebooks know that measure on many sets."""

    testdata: list[str] | str | None  # "published": those of the 16 there are; None: all there are
    quick_eval: Count | None = None  # at most this many images of each set, for a first look; tables then say so
    protocol: Protocol = "last"  # robust at the last iterate, as published, or at every one
    seeds: Distinct[Natural] | None  # one fine-tuning for each; None: seed alone

    @model_validator(mode="after")
    def _released_attack_has_one_protocol(self) -> "MeasureSettings":
        if self.attack_precision == "released-fp16" and self.protocol != "last":
            raise ValueError("attack_precision 'released-fp16' is read at the last iterate, protocol 'last'")
        return self

    @model_validator(mode="after")
    def _epsilons_are_settings(self) -> "MeasureSettings":
        for eps in getattr(self, "test_eps_list", []):
            try:
                self.only(AttackSettings, test_eps=eps)
            except SettingsError as error:
                raise ValueError(f"test_eps_list: {error}") from None
        return self

    @property
    def at_most_images(self) -> int | None:
        """Of each test set; None: all."""
        return min((n for n in (self.quick_eval, self.test_images) if n), default=None)

    @field_validator("testdata")
    @classmethod
    def _sets_or_published(cls, value: list[str] | str | None) -> list[str] | str | None:
        if isinstance(value, str) and value != "published":
            raise ValueError("should be a list of sets, 'published', or None")
        return _distinct(value) if isinstance(value, list) else value


class EvaluateNotebook(MeasureSettings):
    methods: Annotated[list[str], AfterValidator(_distinct)]  # that are trained and measured; may be none
    models: dict[str, Any] = {}  # name -> weights as ``pretrained`` has them, or {arch: ..., pretrained: ...}
    interpolate: Annotated[list[Fraction], AfterValidator(_distinct)] = []  # w: measured too, (1 - w) theta0 + w theta
    # measured too, with these steps; "transfer": PGD made against each other model of the run
    other_attacks: Annotated[list[Annotated[str, AfterValidator(_other_attack)]], AfterValidator(_distinct)] = []
    test_eps_list: Annotated[list[Length255], AfterValidator(_distinct)] = []  # of all attacks, besides test_eps
    # at test time, that models are measured behind as well
    defences: Annotated[list[str], BeforeValidator(_listed), AfterValidator(_distinct)] = []
    plumbing: bool = False  # other weights stand in for those that are meant: numbers are stamped, and mean nothing

    @field_validator("models")
    @classmethod
    def _are_weights(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, given in value.items():
            parts = given if isinstance(given, dict) else {"arch": "", "pretrained": given}
            if set(parts) != {"arch", "pretrained"} or not all(isinstance(part, str) for part in parts.values()):
                raise ValueError(
                    f"{name!r} is {_SHORT.repr(given)}; it should be weights (a file or a name, as for pretrained), or "
                    "{arch: ARCHITECTURE, pretrained: WEIGHTS}"
                )
            resolve(parts["pretrained"])
        return value

    @model_validator(mode="after")
    def _names_and_attacks_do_not_collide(self) -> "EvaluateNotebook":
        for name in self.models:
            if name in (ORIGINAL, *self.methods):
                what = "the untuned model's" if name == ORIGINAL else "a method's"
                raise ValueError(f"models: {name!r} is {what} name, too; give these weights another one")
        if self.attack in self.other_attacks:
            raise ValueError(f"other_attacks: {self.attack!r} is the attack itself")
        for name in {*self.other_attacks} - {TRANSFER}:
            self.only(AttackSettings, attack=name)
        if self.defences:
            check_guarded(self.attack)
        return self

    @property
    def data_options(self) -> dict[str, Any]:
        return super().data_options | ({"world": PLUMBING} if self.plumbing else {})


class AblationNotebook(MeasureSettings):
    ablations: str | Distinct[str]  # "cut": a few runs of each; "all"; a list of ABLATIONS, or one: all runs of these
    Alpha_list: Distinct[NonNegative]  # compared
    Beta_list: Distinct[NonNegative]  # compared
    train_eps_list: Distinct[Eps255]  # compared, 1/255
    test_eps_list: Distinct[Length255]  # compared, 1/255
    train_numsteps_list: Distinct[Count]  # compared
    test_numsteps_list: Distinct[Count]  # compared
    last_num_ft_list: Distinct[Natural]  # compared; 0: the whole encoder
    lr_list: Distinct[Positive]  # compared
    attack_images: Count  # for each set, under the attacks of "epsilon"
    attack_sets: Count | None = None  # of the sets, evenly chosen, under these; None: all

    @property
    def at_most_attacked(self) -> int:
        """Images of each set that is attacked many times."""
        return min(self.attack_images, self.quick_eval or self.attack_images)

    @field_validator("ablations")
    @classmethod
    def _known_ablations(cls, value: str | list[str]) -> str | list[str]:
        if value in ("cut", "all"):
            return value
        names = [value] if isinstance(value, str) else value
        for name in names:
            if name not in ABLATIONS:
                raise ValueError(f"{name!r} is unknown; choose 'cut', 'all', or of {', '.join(ABLATIONS)}")
        return names


class HoldNotebook(MeasureSettings):
    Alpha_list: Annotated[list[NonNegative], AfterValidator(_distinct)]  # of TGA-ZSR, each with its own Beta
    Beta_list: Annotated[list[NonNegative], AfterValidator(_distinct)]  # of TGA-ZSR, each with its own Alpha
    test_numsteps_list: Distinct[Count]  # compared
    attack_sets: Count | None = None  # of the sets, evenly chosen; None: all


class ExplorerNotebook(CandidateSettings, FinetuneSettings, AttackSettings):
    dataset: str
    train_images: Count | None  # for fine-tuning at the sliders' place
    test_images: Count  # to choose from


NOTEBOOKS: dict[str, type[WorkbookSettings]] = {
    "00_pretrain_mini_clip": PretrainNotebook,
    "01_attention_shift": AttentionShiftNotebook,
    "02_train_tga_zsr": TrainNotebook,
    "03_ablations": AblationNotebook,
    "04_evaluate_16_datasets": EvaluateNotebook,
    "05_alpha_beta_explorer": ExplorerNotebook,
    "06_does_it_hold": HoldNotebook,
}

AnySettings = TypeVar("AnySettings", bound=Settings)
TEXT = (str, str | None)  # of parameters that are text, whatever it looks like
_SHORT = reprlib.Repr()  # of what a message quotes
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxdict = 20


def validate(model: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Settings from plain values. Raises SettingsError, one line, for an unknown name or a value out of range."""
    unknown = sorted(set(values) - set(model.model_fields), key=str)  # YAML has names that are no strings
    if unknown:
        raise SettingsError(unknown_parameter(unknown[0], model.model_fields))
    try:
        return model(**values)
    except ValidationError as error:
        errors = error.errors()
        first = next((e for e in errors if e["type"] != "missing"), errors[0])
        name = ".".join(map(str, first["loc"]))
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[0].lower() + problem[1:]
        if first["type"] == "float_parsing" and ("eps" in name or "stepsize" in name):
            problem += "; it is in 1/255, such as 8 or '8/255'"
        given = "" if first["type"] == "missing" else f" = {_SHORT.repr(first['input'])}"
        raise SettingsError(f"parameter {name}{given}: {problem}" if name else problem) from None


def untuned(values: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Of a notebook's checked parameters: what is measured as it is, name -> (architecture, if named, weights)."""
    found: dict[str, tuple[str | None, str | None]] = {ORIGINAL: (values["arch"], values["pretrained"])}
    for name, given in values["models"].items():
        found[name] = (None, given) if isinstance(given, str) else (given["arch"], given["pretrained"])
    return found


def named_weights(values: Mapping[str, Any]) -> list[tuple[str, str, str | None]]:
    """Of a notebook's checked parameters: (the parameter, architecture, weights) of each model that they name."""
    if not {"arch", "pretrained"} <= values.keys():
        return []
    own = [(name, values["arch"], values[name]) for name in ("pretrained", "tuned") if name in values]
    given = list(untuned(values).items())[1:] if "models" in values else []
    return own + [(f"models: {name}", arch or values["arch"], weights) for name, (arch, weights) in given]


def unknown_parameter(name: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]}? --list parameters shows all" if close else f"known are {', '.join(sorted(known))}"
    return f"unknown parameter {name!r}: {hint}"


def yaml_value(name: str, text: str) -> Any:
    """What a parameter is that was given as text. Raises SettingsError."""
    try:
        return load_yaml(text)
    except YAML_ERRORS as error:
        raise SettingsError(f"parameter {name} = {text[:200]!r} is not valid YAML: {error}") from None


def from_notebook(model: type[AnySettings], namespace: Mapping[str, Any]) -> AnySettings:
    """Settings from what a notebook's parameters cell, and papermill's injected one below it, have set.

    ``namespace`` is the notebook's ``globals()``. A plain value whose name is nearly a parameter's is taken for a slip.
    A list or mapping may be text, as YAML or JSON, since plain papermill's ``-p`` knows no others.
    """
    values = {name: namespace[name] for name in model.model_fields if name in namespace}
    for name, value in values.items():
        if (
            isinstance(value, str)
            and value.lstrip()[:1] in ("[", "{")
            and model.model_fields[name].annotation not in TEXT
        ):
            values[name] = yaml_value(name, value)
    for name, value in namespace.items():
        plain = value is None or isinstance(value, (bool, int, float, str, list, dict))
        if plain and name not in values and difflib.get_close_matches(name, model.model_fields, cutoff=0.75):
            raise SettingsError(unknown_parameter(name, model.model_fields))
    return validate(model, values)
