"""What the notebooks set up alike, in one call: checked parameters, the run's folder, models, image sets, the bench."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown, display

from tgazsr_utils.core.defences import find_defence
from tgazsr_utils.core.frontier import interpolated
from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import PRESET, Objective, find_objective
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.datasets.descriptions import read_descriptions
from tgazsr_utils.datasets.loading import choose_datasets, load_dataset
from tgazsr_utils.display import style
from tgazsr_utils.display.report import answer_path
from tgazsr_utils.effects import units, without_effect
from tgazsr_utils.measuring.bench import Bench
from tgazsr_utils.measuring.records import AttackCheck, Record, RecordStore
from tgazsr_utils.measuring.tables import save_table
from tgazsr_utils.parameters import (
    NOTEBOOKS,
    TRANSFER,
    SettingsError,
    WorkbookSettings,
    from_notebook,
    untuned,
    validate,
)
from tgazsr_utils.paths import ROOT, resolve
from tgazsr_utils.profiles import check_prompts, default_parameters, folder_name, names_set_in, shown, with_labels
from tgazsr_utils.runtime import processes
from tgazsr_utils.runtime.files import write_atomic
from tgazsr_utils.runtime.finetuning import TrainResult, finetune
from tgazsr_utils.runtime.runs import Run
from tgazsr_utils.runtime.weights import described_architecture, find_weights, load_clip


def open_workbook(notebook: str, namespace: Mapping[str, Any]) -> "Workbook":
    """Checks the parameters that a notebook's cells have set (``namespace``: its ``globals()``); says where results go.

    What no cell has set is as the notebook ``notebook`` has it. Raises SettingsError, one line, for a bad one;
    ValueError for a method that is not there or a prompt too long.
    """
    if notebook not in NOTEBOOKS:
        raise SettingsError(
            f"open_workbook takes one of {', '.join(NOTEBOOKS)}, whose parameters it checks; not {notebook!r}"
        )
    own = names_set_in(notebook) - NOTEBOOKS[notebook].model_fields.keys()
    given = {name: value for name, value in namespace.items() if name not in own}
    settings = from_notebook(NOTEBOOKS[notebook], {**default_parameters(notebook), **given})
    for method in [*getattr(settings, "methods", []), *getattr(settings, "overrides", {})]:
        find_objective(method)
    for name in getattr(settings, "defences", []):
        find_defence(name)
    idle, changed = without_effect(settings), changes(notebook, settings)
    usual = ROOT / "runs" / folder_name("mini", changed)
    folder = resolve(settings.output) if settings.output else usual
    told = [f"{name} = {changed[name]!r} has no effect here: {idle[name]}" for name in changed if name in idle]
    told += [*units(settings.model_dump()), *check_prompts(settings)]
    if settings.test_fraction == 1 and isinstance(settings, FinetuneSettings):
        told.append("test_fraction = 1: images to tune on are those to test on, where a set has no split of its own")
    print(f"results go to {shown(folder)}", *told, sep="\n", flush=True)
    return Workbook(notebook, settings, Run(folder))


def changes(notebook: str, settings: WorkbookSettings) -> dict[str, Any]:
    """The parameters that are not as the notebook's own cell has them, or by default."""
    usual = validate(type(settings), default_parameters(notebook))
    given = sorted(settings.model_fields_set - {"output"})
    return {name: getattr(settings, name) for name in given if getattr(settings, name) != getattr(usual, name)}


class Workbook:
    """A notebook at work. Models and image sets are loaded when they are first asked for."""

    def __init__(self, notebook: str, settings: Any, run: Run):
        self.notebook, self.settings, self.run = notebook, settings, run
        self.checks: dict[tuple[str, int], AttackCheck] = {}  # of the attack, by method and seed
        self._told: set[str] = set()  # methods
        self._tests: dict[tuple[int | None, int], list[ImageSet]] = {}  # by their number and side
        self._measured: dict[tuple[str, int], Clip] = {}  # by method and seed, where others are attacked through them

    def weights(self, name: str | None) -> str | None:
        """What to load for a model parameter; "latest:METHOD" is of this run."""
        return find_weights(name, self.run.models)

    def model(self, name: str | None, arch: str | None = None) -> Clip:
        """Weights into an architecture; None: the one that comes with them, or else the notebook's."""
        weights = self.weights(name)
        arch = arch or described_architecture(weights) or self.settings.arch
        clip = load_clip(arch, weights, **self.settings.model_options)
        return clip.to(self.original.device) if processes.are_started() and "original" in vars(self) else clip

    @cached_property
    def original(self) -> Clip:
        return self.model(self.settings.pretrained, self.settings.arch)

    def images(self, key: str, split: str, n: int | None, clip: Clip | None = None) -> ImageSet:
        """A set at the size that a model takes, the original one if None; to measure on, it is decoded once for all."""
        options = self.settings.data_options | {"keep": self.run.store / "decoded" if split == "test" else None}
        data = load_dataset(key, split, n=n, image_size=(clip or self.original).image_size[0], **options)
        names, prompts = with_labels(self.settings, key, data.class_names, data.prompts)
        key = resolve(self.settings.data_root).name if key == "." else key  # the folder of sets is a set itself
        alike = data.published and prompts == data.prompts
        return replace(data, key=key, class_names=names, prompts=prompts, published=alike)

    @cached_property
    def train(self) -> ImageSet:
        """The part to tune on."""
        data = self.images(self.settings.dataset, "train", self.settings.train_images)
        path = getattr(self.settings, "descriptions", None)
        return data if path is None else replace(data, descriptions=read_descriptions(path, data.class_names))

    @cached_property
    def test(self) -> ImageSet:
        """Held-out images of the set that is tuned on."""
        return self.images(self.settings.dataset, "test", self.settings.test_images)

    def tests(self, n: int | None, clip: Clip | None = None) -> list[ImageSet]:
        """At most ``n`` images of each test set, at the size that a model takes; None: the original one."""
        s, side = self.settings, (clip or self.original).image_size[0]
        if (n, side) not in self._tests:
            keys = choose_datasets(s.testdata, s.data_root, s.test_fraction)
            self._tests[n, side] = [self.images(key, "test", n, clip) for key in keys]
        return self._tests[n, side]

    @cached_property
    def attack(self) -> AttackSettings:
        return self.settings.only(AttackSettings)

    def bench(self, sets: Sequence[ImageSet]) -> Bench:
        """Measures into the run's store, and checks the attack on some images of ``sets``."""
        s, store = self.settings, RecordStore(self.run.stored_records)
        return Bench.checking(store, self.attack, sets, s.check_images, s.number_of_processes)

    def at_each_eps(self, names: Sequence[str]) -> list[AttackSettings]:
        """These attacks at each epsilon, a step of theirs being the same part of it throughout."""
        s, found = self.settings, []
        for eps, name in product(dict.fromkeys([s.test_eps, *s.test_eps_list]), names):
            step = s.test_stepsize * (eps / s.test_eps if s.test_eps else 1)
            found.append(s.only(AttackSettings, attack=name, test_eps=eps, test_stepsize=step))
        return found

    @cached_property
    def attacks(self) -> list[AttackSettings]:
        """What notebook 04 measures under, the one of its tables first."""
        return self.at_each_eps([self.settings.attack, *(a for a in self.settings.other_attacks if a != TRANSFER)])

    @cached_property
    def untuned(self) -> dict[str, tuple[str | None, str | None]]:
        """What notebook 04 measures as it is: name -> (architecture, weights), the original model first."""
        return untuned(self.settings.model_dump())

    def measure(self, clip: Clip, method: str, seed: int) -> list[Record]:
        """Of a model on the test sets, at the size it takes: clean and under each of ``attacks``.

        The first attack is checked, which is noted in ``checks``; what cannot be trusted under it is under none. It is
        also the one that the model is measured under behind each of the parameter ``defences``.
        """
        if TRANSFER in self.settings.other_attacks:
            self._measured[method, seed] = clip
        sets = self.tests(self.settings.at_most_images, clip)
        bench = replace(self.bench(sets), checks=self.checks)
        options = {"protocol": self.settings.protocol, "method": method, "seed": seed}
        records = bench.measure(clip, sets, self.attack, **options)
        if any(record.attack != "none" for record in records):
            for attack in self.attacks[1:]:
                records += replace(bench, checked_on=()).measure(clip, sets, attack, **options)[1::2]
            for name in self.settings.defences:
                records += replace(bench, checked_on=()).measure(clip, sets, self.attack, **options, defence=name)
        return records

    def transfer(self) -> list[Record]:
        """Where TRANSFER is among other attacks: each model that ``measure`` had, under PGD on each of the others.

        That is the untuned ones and those of its seed, if they take images of its size; what cannot be trusted is left
        out, as in ``measure``. So many measurements as there are pairs of models.
        """
        records = []
        seeds = [seed for method, seed in self._measured if method not in self.untuned]
        for (method, seed), clip in self._measured.items():
            check, sets = self.checks.get((method, seed)), self.tests(self.settings.at_most_images, clip)
            bench = replace(self.bench(sets), checked_on=())
            near = seed if method not in self.untuned or seed in seeds else min(seeds, default=seed)
            for (other, its_seed), source in self._measured.items():
                alike = source.image_size == clip.image_size and (other in self.untuned or its_seed == near)
                if other != method and alike and not (check and check.problems):
                    for attack in self.at_each_eps(["pgd"]):
                        options = {"method": method, "seed": seed, "source": source}
                        records += bench.measure(clip, sets, attack, **options)[1::2]
        return records

    def tune(self, method: str | Objective, seed: int | None = None) -> TrainResult:
        """The original model fine-tuned by a method; the latest of this run then."""
        name = method if isinstance(method, str) else method.name
        settings = self.settings.finetuning(name, **({} if seed is None else {"seed": seed}))
        self._say_what_is_not_its_own(find_objective(name) if isinstance(method, str) else method, settings)
        options = {"number_of_processes": self.settings.number_of_processes}
        tuned = finetune(self.original, self.train, method, settings, self.run.stored_models, **options)
        self.run.show(tuned.weights)
        return tuned

    def _say_what_is_not_its_own(self, method: Objective, settings: FinetuneSettings) -> None:
        """Of a method that somebody has added: what it was registered with, and is trained otherwise here; once."""
        if method.terms.__module__.startswith("tgazsr_utils.") or method.name in self._told:
            return
        self._told.add(method.name)
        for name in method.preset.keys() - self.settings.overrides.get(method.name, {}).keys():
            own, here = method.preset[name], getattr(settings, name)
            if own != PRESET.get(name) and here not in (None, own):
                print(f"{method.name}: {name} is {here} here, not its own {own} (-p {name} null: each method's own)")

    def tuned(self, method: str, seed: int) -> Iterator[tuple[str, Clip]]:
        """What notebook 04 measures of a method, by name: the tuned model, then those on the way to it."""
        clip = self.tune(method, seed).clip
        yield method, clip
        for w in self.settings.interpolate:
            yield f"{method} w={w:g}", interpolated(self.original, clip, w)

    def ahead(self, work: Callable[[], Any], trainings: Sequence[Callable[[], Any]] = ()) -> None:
        """Where there are several processes: has them do all of ``work``, which then finds everything done.

        They are started once, so that each compiles once. ``trainings`` are what ``work`` trains: each is done by one
        process as if it were alone, in whole rounds; the processes share each batch of what is left.
        """
        if processes.are_started():
            processes.do_apart(trainings)
        elif self.settings.number_of_processes > 1:
            processes.launch(self.settings.number_of_processes, self._in_a_process, self.original, work, trainings)

    def _in_a_process(self, clip: Clip, work: Callable[[], Any], trainings: Sequence[Callable[[], Any]]) -> None:
        processes.do_apart(trainings)  # ``clip``, the original model, is on this process's device by now
        with contextlib.redirect_stdout(sys.stdout if processes.is_main() else io.StringIO()):
            work()

    def save(self, what: style.Figure | pd.DataFrame | Sequence[Record], name: str) -> Any:
        """Keeps a figure, a table or records in the run's folder, for people; gives back what a notebook shows."""
        if isinstance(what, style.Figure):
            return style.save(what, self.run.folder, name)
        if isinstance(what, pd.DataFrame):
            save_table(what, self.run.folder, name)
        else:
            lines = "".join(record.model_dump_json() + "\n" for record in what)
            path = self.run.folder / "records" / f"{name}.jsonl"
            write_atomic(path, lambda temporary: Path(temporary).write_text(lines, encoding="utf-8"))
        return what

    def answer(self, sentence: str) -> None:
        """Shows the sentence that answers the notebook's question, and keeps it for the run's report."""
        path = answer_path(self.run.folder, self.notebook)
        write_atomic(path, lambda temporary: temporary.write_text(sentence + "\n", encoding="utf-8"))
        verdict, _, rest = sentence.partition(":")
        display(Markdown(f"**{verdict}:**{rest}" if rest else sentence))
