"""The ablations: what each one varies, and the sweep that trains and measures its variants, resumable.

An ablation is one function that lists its variants from the notebook's settings; the first is what the others are
compared with. To add one, write such a function, put it into ``ABLATIONS`` and name it in ``parameters.AblationName``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import pandas as pd

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import find_objective
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings, Protocol
from tgazsr_utils.durable.finetuning import finetune, tuned_path
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import Record
from tgazsr_utils.measuring.tables import difference, per_seed, summary

UNTUNED = "CLIP"


class AblationSettings(Interface):
    """What variants are made from, as notebook 03 takes it (``parameters.AblationNotebook``)."""

    seed: int
    seeds: list[int] | None
    methods: list[str]
    ablations: str | list[str]  # "cut", "all", or names
    protocol: Protocol
    test_eps: float  # 1/255, as in all below
    test_stepsize: float
    test_numsteps: int
    Alpha_list: list[float]
    Beta_list: list[float]
    train_eps_list: list[float]
    test_eps_list: list[float]
    train_numsteps_list: list[int]
    test_numsteps_list: list[int]
    last_num_ft_list: list[int]

    def finetuning(self, method: str) -> FinetuneSettings: ...

    def only(self, model: type[AttackSettings], **changes: Any) -> AttackSettings: ...


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


def base_training(s: AblationSettings) -> FinetuneSettings:
    """The settings of TGA-ZSR, which variants start from whatever their method, so that one thing varies."""
    return find_objective("TGA-ZSR").with_preset(s.finetuning("TGA-ZSR"))


def variant(
    s: AblationSettings,
    label: Mapping[str, Any],
    method: str = "TGA-ZSR",
    *,
    training: FinetuneSettings | None = None,
    attack: Mapping[str, Any] = {},
    protocol: Protocol | None = None,
    seeds: Sequence[int] | None = None,
    few_images: bool = False,
    in_cut: bool = True,
    **changes: Any,
) -> Variant:
    """A variant trained with ``base_training`` (or ``training``) but for ``changes``."""
    trained = FinetuneSettings(**(training or base_training(s)).model_dump() | changes)
    return Variant(
        label,
        method,
        None if method == UNTUNED else trained,
        s.only(AttackSettings, **attack),
        protocol or s.protocol,
        (s.seed,) if method == UNTUNED else tuple(seeds or s.seeds or [s.seed]),
        few_images,
        in_cut,
    )


def loss_parts(s: AblationSettings) -> Iterator[Variant]:
    """Which of the two attention terms does what?"""
    yield variant(s, {"loss": "CE"}, "TeCoA")
    yield variant(s, {"loss": "CE + L_AR"}, Beta=0.0)
    yield variant(s, {"loss": "CE + L_AMC"}, Alpha=0.0)
    yield variant(s, {"loss": "CE + L_AR + L_AMC"})


def distance(s: AblationSettings) -> Iterator[Variant]:
    """Does it matter how the distance of two maps is measured? Alpha and Beta stay what they are for l2."""
    for metric in ("l2", "l1", "cos"):
        yield variant(s, {"distance": metric}, Distance_metric=metric, in_cut=metric != "l1")


def attention(s: AblationSettings) -> Iterator[Variant]:
    """Which attention is worth holding in place?"""
    yield variant(s, {"attention": "reference"}, attention_variant="reference")
    yield variant(s, {"attention": "cosine"}, attention_variant="cosine")
    yield variant(s, {"attention": "complementary"}, "Comp-TGA")
    yield variant(s, {"attention": "visual, detached"}, "Vision-based")
    yield variant(s, {"attention": "visual, differentiable"}, "Vision-based-grad", in_cut=False)
    yield variant(s, {"attention": "none (TeCoA)"}, "TeCoA")


def alpha_beta(s: AblationSettings) -> Iterator[Variant]:
    """How much of each term?"""
    base = base_training(s)
    quick = {*product((0.0, base.Alpha), (0.0, base.Beta)), (max(s.Alpha_list), max(s.Beta_list))}
    grid = product(sorted({*s.Alpha_list, base.Alpha}), sorted({*s.Beta_list, base.Beta}))
    for a, b in _first((base.Alpha, base.Beta), grid):
        # Without both terms it is TeCoA, under whose name other ablations have trained it.
        yield variant(
            s,
            {"Alpha": a, "Beta": b},
            "TeCoA" if a == b == 0 else "TGA-ZSR",
            **({} if a == b == 0 else {"Alpha": a, "Beta": b}),
            in_cut=(a, b) in quick,
        )


def epsilon(s: AblationSettings) -> Iterator[Variant]:
    """How do the budgets and steps of training and of testing act together?"""
    base = base_training(s)
    stride = base.train_stepsize / base.train_eps if base.train_eps else 1.0
    for train_eps, test_eps in product(
        [*_first(base.train_eps, s.train_eps_list), UNTUNED], _first(s.test_eps, s.test_eps_list)
    ):
        same = train_eps in (UNTUNED, base.train_eps)  # stride * eps would be off by a rounding
        changes = {} if same else {"train_eps": train_eps, "train_stepsize": stride * train_eps}
        in_cut = train_eps in (base.train_eps, max(s.train_eps_list), UNTUNED)
        yield _trained_and_tested(s, train_eps, base.train_numsteps, test_eps, s.test_numsteps, in_cut, changes)
    for train_steps, test_steps in product(
        _first(base.train_numsteps, s.train_numsteps_list), _first(s.test_numsteps, s.test_numsteps_list)
    ):
        if (train_steps, test_steps) != (base.train_numsteps, s.test_numsteps):
            changes, in_cut = {"train_numsteps": train_steps}, train_steps == base.train_numsteps
            yield _trained_and_tested(s, base.train_eps, train_steps, s.test_eps, test_steps, in_cut, changes)


def _trained_and_tested(s, train_eps, train_steps, test_eps, test_steps, in_cut, changes) -> Variant:
    """A variant of ``epsilon``; the attack's step is the same part of its epsilon throughout."""
    label = {"train_eps": train_eps, "train_numsteps": train_steps, "test_eps": test_eps, "test_numsteps": test_steps}
    attack = {"test_eps": test_eps, "test_numsteps": test_steps}
    if s.test_eps not in (0, test_eps):
        attack["test_stepsize"] = s.test_stepsize * test_eps / s.test_eps
    method = UNTUNED if train_eps == UNTUNED else "TGA-ZSR"
    return variant(s, label, method, attack=attack, few_images=True, in_cut=in_cut, **changes)


def tuned_part(s: AblationSettings) -> Iterator[Variant]:
    """Must the whole image encoder be tuned? Counted in parameter tensors from its end."""
    for last in _first(0, s.last_num_ft_list):
        label = {"tuned": f"last {last} tensors" if last else "whole encoder"}
        yield variant(s, label, last_num_ft=last, in_cut=last in (0, s.last_num_ft_list[-1]))


def attacks(s: AblationSettings) -> Iterator[Variant]:
    """Does robustness hold against stronger attacks, and when every iterate counts?"""
    steps, strong = s.test_numsteps, [n for n in s.test_numsteps_list if n > s.test_numsteps][-1:]
    kinds = [
        *(
            (f"PGD-{n}, {protocol}", "pgd", n, protocol, n == steps)
            for n in (steps, *strong)
            for protocol in ("last", "worst")
        ),
        (f"CW-{steps}, last", "cw", steps, "last", True),
        ("AutoAttack", "autoattack", 100, "worst", True),
    ]
    for method, (kind, attack, n, protocol, in_cut) in product([*s.methods, UNTUNED], kinds):
        training = None if method == UNTUNED else _own_training(s, method)
        yield variant(
            s,
            {"method": method, "attack": kind},
            method,
            training=training,
            protocol=protocol,
            few_images=True,
            attack={"attack": attack, "test_numsteps": n},
            in_cut=in_cut and method != UNTUNED,
        )


def seeds(s: AblationSettings) -> Iterator[Variant]:
    """How much is chance?"""
    several = s.seeds if s.seeds and len(s.seeds) > 1 else [s.seed, s.seed + 1, s.seed + 2]
    for method in s.methods:
        yield variant(s, {"method": method}, method, training=_own_training(s, method), seeds=several)


def _own_training(s: AblationSettings, method: str) -> FinetuneSettings:
    """As notebook 04 trains a method."""
    return find_objective(method).with_preset(s.finetuning(method))


def _first(base: Any, values: Sequence | Iterator) -> list:
    return [base, *(value for value in values if value != base)]


ABLATIONS: dict[str, Callable[[AblationSettings], Iterator[Variant]]] = {
    f.__name__: f for f in (loss_parts, distance, attention, alpha_beta, epsilon, tuned_part, attacks, seeds)
}


def question(name: str) -> str:
    """What an ablation asks."""
    return ABLATIONS[name].__doc__.splitlines()[0]


def plan(s: AblationSettings) -> dict[str, list[Variant]]:
    """The variants of each ablation that ``s.ablations`` asks for."""
    names = list(ABLATIONS) if s.ablations in ("cut", "all") else s.ablations
    return {name: [v for v in ABLATIONS[name](s) if v.in_cut or s.ablations != "cut"] for name in names}


class Sweep:
    """Trains and measures variants, each once however many ablations ask for it; what is done is only read.

    ``tests``: the sets that variants are measured on; ``parts`` of them are for variants with ``few_images``. Tuned
    models go to ``models``; records to the ``bench``, which measures all variants of a model alike.
    """

    def __init__(
        self,
        original: Clip,
        train: ImageSet,
        tests: Sequence[ImageSet],
        parts: Sequence[ImageSet],
        models: Path,
        bench: Bench,
    ):
        self.original, self.train, self.tests, self.parts, self.models, self.bench = (
            original,
            train,
            tests,
            parts,
            models,
            bench,
        )
        self._loaded: dict[Path, Clip] = {}

    def run(self, name: str, variants: Sequence[Variant]) -> list[tuple[Variant, list[Record]]]:
        """An ablation's variants, each with its records."""
        done = []
        for number, v in enumerate(variants, start=1):
            print(f"{name} {number}/{len(variants)}: {', '.join(map(str, v.label.values()))}", flush=True)
            done.append((v, self.records_of(v)))
        return done

    def records_of(self, v: Variant) -> list[Record]:
        """What was measured of a variant, all its seeds."""
        records = []
        for seed in v.seeds:
            clip = self.original if v.training is None else self._tuned(v, seed)
            records += self.bench.measure(
                clip, self.parts if v.few_images else self.tests, v.attack, v.protocol, method=v.method, seed=seed
            )
        return records

    def _tuned(self, v: Variant, seed: int) -> Clip:
        """The model of a variant, trained if it is not there; the last ones used are kept."""
        training = v.training.model_copy(update={"seed": seed})
        path = tuned_path(self.models, find_objective(v.method), training, self.train, self.original)
        if path not in self._loaded:
            processes = self.bench.number_of_processes
            self._loaded[path] = finetune(
                self.original, self.train, v.method, training, self.models, number_of_processes=processes
            ).clip
            if len(self._loaded) > 4:
                del self._loaded[next(iter(self._loaded))]
        return self._loaded[path]


# What a variant is compared with is the first one that agrees with it in these; elsewhere the first one of all.
COMPARED_WITHIN = {"attacks": ("method",), "epsilon": ("test_eps", "test_numsteps")}


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


def by_seed(done: Sequence[tuple[Variant, list[Record]]]) -> pd.DataFrame:
    """One row a variant and seed: what is varied, seed, robust, clean, average."""
    parts = [per_seed(records).reset_index().assign(**v.label) for v, records in done]
    return pd.concat(parts, ignore_index=True)
