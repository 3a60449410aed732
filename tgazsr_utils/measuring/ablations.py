"""The ablations: what each one varies, and the sweep that trains and measures its variants, resumable.

An ablation is one function that lists its variants from the notebook's settings; the first is what the others are
compared with. To add one, write such a function and put it into ``ABLATIONS``.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import find_objective
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings, Protocol
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import difference, per_seed, summary
from tgazsr_utils.runtime.finetuning import finetune, tuned_path

UNTUNED = "CLIP"
AblationSettings = Any  # ``parameters.AblationNotebook``, which is in a room that this one does not import


@dataclass(frozen=True)
class Variant:
    """One line of an ablation's table: what is trained, and what it is measured with."""

    label: Mapping[str, Any]  # what is varied -> its value here
    method: str
    training: FinetuneSettings | None  # None: the untuned model
    attack: AttackSettings
    protocol: Protocol
    seeds: tuple[int, ...]
    few_images: bool = False  # measured on ``attack_images`` of each set: many or long attacks on one model
    in_cut: bool = True  # part of the quick look
    transfer: bool = False  # attacked against the untuned model


def base_training(s: AblationSettings, method: str = "TGA-ZSR") -> FinetuneSettings:
    """As notebook 04 trains a method. TGA-ZSR's is where variants start, whatever theirs, so that one thing varies."""
    return find_objective(method).with_preset(s.finetuning(method))


def variant(
    s: AblationSettings,
    label: Mapping[str, Any],
    method: str = "TGA-ZSR",
    *,
    own: bool = False,
    attack: Mapping[str, Any] = {},
    protocol: Protocol | None = None,
    seeds: Sequence[int] | None = None,
    few_images: bool = False,
    in_cut: bool = True,
    transfer: bool = False,
    **changes: Any,
) -> Variant:
    """A variant trained with ``base_training``, that of its ``own`` method or of TGA-ZSR, but for ``changes``."""
    training, seeds = None, tuple(seeds or s.seeds or [s.seed])
    if method == UNTUNED:
        seeds = (s.seed,)
    else:
        training = FinetuneSettings(**base_training(s, method if own else "TGA-ZSR").model_dump() | changes)
    attacked = s.only(AttackSettings, **attack)
    return Variant(label, method, training, attacked, protocol or s.protocol, seeds, few_images, in_cut, transfer)


Variants = Callable[[AblationSettings], Iterator[Variant]]
ABLATIONS: dict[str, Variants] = {}
_QUESTIONS: dict[str, str] = {}


def _asks(question: str) -> Callable[[Variants], Variants]:
    """Registers an ablation under its function's name."""

    def register(function: Variants) -> Variants:
        ABLATIONS[function.__name__], _QUESTIONS[function.__name__] = function, question
        return function

    return register


@_asks("Which of the two attention terms does what?")
def loss_parts(s: AblationSettings) -> Iterator[Variant]:
    yield variant(s, {"loss": "CE"}, "TeCoA")
    yield variant(s, {"loss": "CE + L_AR"}, Beta=0.0)
    yield variant(s, {"loss": "CE + L_AMC"}, Alpha=0.0)
    yield variant(s, {"loss": "CE + L_AR + L_AMC"})


@_asks("Does it matter how the distance of two maps is measured? Alpha and Beta stay what they are for l2.")
def distance(s: AblationSettings) -> Iterator[Variant]:
    for metric in ("l2", "l1", "cos"):
        yield variant(s, {"distance": metric}, Distance_metric=metric, in_cut=metric != "l1")


@_asks("Which attention is worth holding in place?")
def attention(s: AblationSettings) -> Iterator[Variant]:
    yield variant(s, {"attention": "reference"}, attention_variant="reference")
    yield variant(s, {"attention": "cosine"}, attention_variant="cosine")
    yield variant(s, {"attention": "complementary"}, "Comp-TGA")
    yield variant(s, {"attention": "visual, detached"}, "Vision-based")
    yield variant(s, {"attention": "visual, differentiable"}, "Vision-based-grad", in_cut=False)
    yield variant(s, {"attention": "none (TeCoA)"}, "TeCoA")


@_asks("How much weight should each attention term have?")
def alpha_beta(s: AblationSettings) -> Iterator[Variant]:
    base = base_training(s)
    quick = {*product((0.0, base.Alpha), (0.0, base.Beta)), (max(s.Alpha_list), max(s.Beta_list))}
    grid = product(sorted({*s.Alpha_list, base.Alpha}), sorted({*s.Beta_list, base.Beta}))
    for a, b in _first((base.Alpha, base.Beta), grid):
        label, in_cut = {"Alpha": a, "Beta": b}, (a, b) in quick
        if a == b == 0:  # it is TeCoA, under whose name other ablations have trained it
            yield variant(s, label, "TeCoA", in_cut=in_cut)
        else:
            yield variant(s, label, in_cut=in_cut, **label)


@_asks("How do the budgets and steps of training and of testing act together?")
def epsilon(s: AblationSettings) -> Iterator[Variant]:
    base = base_training(s)
    stride = base.train_stepsize / base.train_eps if base.train_eps else 1.0
    budgets = product([*_first(base.train_eps, s.train_eps_list), UNTUNED], _first(s.test_eps, s.test_eps_list))
    steps = product(_first(base.train_numsteps, s.train_numsteps_list), _first(s.test_numsteps, s.test_numsteps_list))
    points = [(train, base.train_numsteps, test, s.test_numsteps) for train, test in budgets]
    points += [(base.train_eps, train, s.test_eps, test) for train, test in steps]
    for train_eps, train_steps, test_eps, test_steps in dict.fromkeys(points):  # where both start is there once
        trained = {"train_eps": train_eps, "train_numsteps": train_steps}
        attack = {"test_eps": test_eps, "test_numsteps": test_steps}
        label, method = trained | attack, UNTUNED if train_eps == UNTUNED else "TGA-ZSR"
        # An attack's step is the same part of its epsilon throughout; stride * eps would be off by a rounding.
        if train_eps not in (UNTUNED, base.train_eps):
            trained["train_stepsize"] = stride * train_eps
        if s.test_eps not in (0, test_eps):
            attack["test_stepsize"] = s.test_stepsize * test_eps / s.test_eps
        quick = train_eps in (base.train_eps, max(s.train_eps_list), UNTUNED) and train_steps == base.train_numsteps
        yield variant(s, label, method, attack=attack, few_images=True, in_cut=quick, **trained)


@_asks("Must the whole image encoder be tuned? Tensors: its weights and biases, from the output; a block has twelve.")
def tuned_part(s: AblationSettings) -> Iterator[Variant]:
    for last in _first(0, sorted(s.last_num_ft_list, reverse=True)):
        label = {"tuned": f"last {last} tensors" if last else "whole encoder"}
        yield variant(s, label, last_num_ft=last, in_cut=last in (0, s.last_num_ft_list[-1]))


@_asks("How much is chance?")
def seeds(s: AblationSettings) -> Iterator[Variant]:
    consecutive = range(s.seed, s.seed + (2 if s.ablations == "cut" else 3))
    several = s.seeds if s.seeds and len(s.seeds) > 1 else list(consecutive)
    for method in s.methods:
        yield variant(s, {"method": method}, method, own=True, seeds=several)


@_asks("Which learning rate suits each method? One grid for all, on the sets that are measured.")
def learning_rate(s: AblationSettings) -> Iterator[Variant]:
    for method in s.methods:
        own = base_training(s, method).lr
        for lr in _first(own, s.lr_list):
            yield variant(s, {"method": method, "lr": lr}, method, own=True, in_cut=False, lr=lr)


def _first(base: Any, values: Sequence | Iterator) -> list:
    return [base, *(value for value in values if value != base)]


def question(name: str) -> str:
    """What an ablation asks."""
    return _QUESTIONS[name]


def plan(s: AblationSettings) -> dict[str, list[Variant]]:
    """The variants of each ablation that ``s.ablations`` asks for; without those that the cut has nothing of."""
    names = list(ABLATIONS) if s.ablations in ("cut", "all") else s.ablations
    chosen = {name: [v for v in ABLATIONS[name](s) if v.in_cut or s.ablations != "cut"] for name in names}
    return {name: variants for name, variants in chosen.items() if variants}


@dataclass
class Sweep:
    """Trains and measures variants, each once however many ablations ask for it; what is done is only read."""

    original: Clip
    train: ImageSet
    tests: Sequence[ImageSet]  # that variants are measured on
    parts: Sequence[ImageSet]  # of them, for variants with ``few_images``
    models: Path  # folder of tuned models
    bench: Bench  # which measures all variants of a model alike, and keeps the records
    _loaded: dict[Path, Clip] = field(default_factory=dict)

    def run(self, name: str, variants: Sequence[Variant]) -> list[tuple[Variant, list[Record]]]:
        """An ablation's variants, each with its records; without learning rates at which training diverges."""
        done = []
        for number, v in enumerate(variants, start=1):
            label = ", ".join(
                str(value) if isinstance(value, str) else f"{key} {value}" for key, value in v.label.items()
            )
            print(f"{name} {number}/{len(variants)}: {label}", flush=True)
            try:
                done.append((v, self.records_of(v)))
            except FloatingPointError as error:
                if name != "learning_rate" or len(variants) == number and not done:
                    raise
                print(f"left out: {error}", flush=True)
        return done

    def trainings(self, plan: Mapping[str, Sequence[Variant]]) -> list[Callable[[], None]]:
        """What a plan trains, each once; none is kept here, as not all of several processes would have it."""
        wanted = [(v, s) for variants in plan.values() for v in variants if v.training is not None for s in v.seeds]
        return list({self._path(v, s): partial(self._ahead, v, s) for v, s in wanted}.values())

    def records_of(self, v: Variant) -> list[Record]:
        """What was measured of a variant, all its seeds."""
        records = []
        for seed in v.seeds:
            clip = self.original if v.training is None else self._tuned(v, seed)
            sets = self.parts if v.few_images else self.tests
            options = {"method": v.method, "seed": seed, "source": self.original if v.transfer else None}
            records += self.bench.measure(clip, sets, v.attack, v.protocol, **options)
        return records

    def _path(self, v: Variant, seed: int) -> Path:
        training = v.training.model_copy(update={"seed": seed})
        return tuned_path(self.models, find_objective(v.method), training, self.train, self.original)

    def _trained(self, v: Variant, seed: int) -> Clip:
        """The model of a variant, trained if its weights are not there."""
        training = v.training.model_copy(update={"seed": seed})
        options = {"number_of_processes": self.bench.number_of_processes}
        return finetune(self.original, self.train, v.method, training, self.models, **options).clip

    def _ahead(self, v: Variant, seed: int) -> None:
        """Its training; one that diverges is told, or left out, when its turn comes (``run``)."""
        with contextlib.suppress(FloatingPointError):
            self._trained(v, seed)

    def _tuned(self, v: Variant, seed: int) -> Clip:
        """The model of a variant; the last ones used are kept."""
        path = self._path(v, seed)
        if path not in self._loaded:
            self._loaded[path] = self._trained(v, seed)
            if len(self._loaded) > 4:
                del self._loaded[next(iter(self._loaded))]
        return self._loaded[path]


# What a variant is compared with is the first one that agrees with it in these; elsewhere the first one of all.
COMPARED_WITHIN = {"learning_rate": ("method",), "does_it_hold": ("model",), "epsilon": ("test_eps", "test_numsteps")}


def table(name: str, done: Sequence[tuple[Variant, list[Record]]]) -> pd.DataFrame:
    """One row a variant of an ablation: its summary, and how far robust and clean accuracy are from the first one's.

    ``robust_minus_first`` and ``clean_minus_first`` are paired differences with their 95 % intervals over images, NaN
    for a first one itself; first is meant within ``COMPARED_WITHIN``.
    """
    rows, firsts = [], {}
    for v, records in done:
        group = tuple(v.label[key] for key in COMPARED_WITHIN.get(name, ()))
        first = firsts.setdefault(group, records)
        row = {**v.label, **summary(records)}
        for kind in ("robust", "clean"):
            found = 3 * (float("nan"),) if first is records else difference(kind, records, first)
            row |= dict(zip((f"{kind}_minus_first", f"{kind}_minus_first_low", f"{kind}_minus_first_high"), found))
        rows.append(row)
    return pd.DataFrame(rows).set_index(list(done[0][0].label))


def best_rates(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Of each method of ablation "learning_rate" the one of the best average, the lowest of equals: ``overrides``."""
    rates = table.reset_index().sort_values(["average", "lr"], ascending=[False, True])
    return {method: {"lr": float(lr)} for method, lr in rates.groupby("method", sort=False).lr.first().items()}


def by_seed(done: Sequence[tuple[Variant, list[Record]]]) -> pd.DataFrame:
    """One row a variant and seed: its method, what is varied, seed, robust, clean, average."""
    parts = [per_seed(records).reset_index().assign(**{"method": v.method, **v.label}) for v, records in done]
    return pd.concat(parts, ignore_index=True)
