"""Measures models on sets, keeps what was measured, and measures nothing twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tgazsr_utils.core.defences import find_defence
from tgazsr_utils.core.images import PLUMBING, ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.settings import AttackSettings, Protocol
from tgazsr_utils.measuring.measure import NOT_YET, Answers, Measurement, answer, record_of
from tgazsr_utils.measuring.records import AttackCheck, Record, RecordStore
from tgazsr_utils.measuring.trust import PASSES, check_attack, check_key, sets_to_check
from tgazsr_utils.progress import progress
from tgazsr_utils.runtime import processes
from tgazsr_utils.runtime.files import load_tensors

AWARE_PASSES = 10  # passes of a step through a defence, about, where one step on the model alone is one


@dataclass(frozen=True)
class Bench:
    """Where records are kept, how many processes of this machine measure, how the attack is checked once a model."""

    store: RecordStore
    number_of_processes: int = 1
    checked_with: AttackSettings | None = None
    checked_on: Sequence[ImageSet] = ()  # none: nothing is checked
    checks: dict[tuple[str, int], AttackCheck] = field(default_factory=dict)  # what was found, by method and seed

    @classmethod
    def checking(
        cls, store: RecordStore, attack: AttackSettings, sets: list[ImageSet], images: int, number_of_processes: int = 1
    ) -> "Bench":
        """With a check on about so many images of ``sets``; on none where random weights or epsilon 0 leave nothing."""
        nothing = not images or not attack.test_eps or sets[0].world == PLUMBING
        return cls(store, number_of_processes, attack, () if nothing else sets_to_check(sets, images))

    def measure(
        self,
        clip: Clip,
        sets: Sequence[ImageSet],
        attack: AttackSettings,
        protocol: Protocol = "last",
        *,
        method: str,
        seed: int = 0,
        source: Clip | None = None,
        defence: str | None = None,
    ) -> list[Record]:
        """Two records a set, clean and attacked, each stored when done; what the store has is not measured again.
        ``source``: see ``evaluate``.

        Behind a ``defence`` three: clean, under the attack on the model alone, and under the attack through both.

        Processes that call this together, as torchrun starts them, share the work too. The attack is checked first,
        once a model, and what was found is noted in ``checks``; where it fails, that is said, and attacked records,
        though stored, are not returned.
        """
        guard = None if defence is None else find_defence(defence)
        kinds = [(None, False), (attack, False), (attack, True)][: 2 if guard is None else 3]
        options = (protocol, method, seed, source, guard)
        wanted = [Measurement(clip, data, kind, *options, aware) for data in sets for kind, aware in kinds]
        if self.number_of_processes > 1 and not processes.are_started() and any(self._to_do(clip, wanted)):
            processes.launch(self.number_of_processes, self._work, clip, wanted)
        else:
            self._work(clip, wanted)
        records = processes.from_main(lambda: [self.store.get(m.key) for m in wanted])
        if None in records:
            raise RuntimeError(f"{records.count(None)} measurements of {method} were made by no process")
        return self._trusted(records, clip, method, seed)

    def _check(self, clip: Clip) -> AttackCheck | None:
        return self.store.checks.get(check_key(clip, self.checked_on, self.checked_with))

    def _check_now(self, clip: Clip) -> None:
        """Keeps what the check finds, and says how many images each of its attacks leaves right."""
        check = check_attack(clip, self.checked_on, self.checked_with)
        self.store.checks.add(check)
        usual = 0.0, check.settings["test_eps"]
        at = lambda one: "" if one.eps_255 in usual else f" (epsilon {one.eps_255:g}/255)"
        left = ", ".join(f"{one.attack}{at(one)} {one.correct}" for one in check.outcomes)
        print(f"check of the attack: of {check.n} images are right, {left}; {check.seconds:.0f} s", flush=True)

    def _to_do(self, clip: Clip, wanted: Sequence[Measurement]) -> tuple[set[str], bool]:
        """Keys of what is not measured, and whether the attack is still to be checked; all processes see the same."""
        missing = lambda: {m.key for m in wanted if self.store.get(m.key) is None}
        unchecked = lambda: bool(self.checked_on) and self._check(clip) is None
        return processes.from_main(lambda: (missing(), unchecked()))

    def _trusted(self, records: list[Record], clip: Clip, method: str, seed: int) -> list[Record]:
        """Without the attacked ones, if the check of the attack says so."""
        if not self.checked_on:
            return records
        check = processes.from_main(lambda: self._check(clip))
        self.checks[method, seed] = check
        if not check.problems:
            return records
        if processes.is_main():
            why = f"as the attack cannot be trusted: {'; '.join(check.problems)}"
            print(f"robust accuracy of {method} (seed {seed}) is not counted, {why}", flush=True)
        return [record for record in records if record.attack == "none"]

    def _work(self, clip: Clip, wanted: Sequence[Measurement]) -> None:
        """Does this process's part of the jobs: the check, and slices of measurements. Ends when all processes have."""
        keys, unchecked = self._to_do(clip, wanted)
        missing = [m for m in wanted if m.key in keys]
        jobs: list[tuple[int, Callable[[Any], None]]] = []  # with the number of images that it measures
        costs: list[float] = []  # in passes of an image
        if unchecked:
            jobs, costs = [(0, lambda bar: self._check_now(clip))], [PASSES * sum(map(len, self.checked_on))]
        for ms in _read_together(missing):
            steps = sum(1 + (m.attack.test_numsteps if m.attack else 0) * (AWARE_PASSES if m.aware else 1) for m in ms)
            for rows in ms[0].slices:
                jobs.append((len(rows) * len(ms), lambda bar, ms=ms, rows=rows: self._answer(ms, rows, bar)))
                costs.append(len(rows) * steps)
        own = processes.own_part(jobs, costs)
        name = f"evaluate {missing[0].method} seed {missing[0].seed}, {missing[-1].label}" if missing else ""
        images = sum(images for images, _ in own)
        with progress(total=images, desc=name, unit="image", disable=not images or not processes.is_main()) as bar:
            for _, job in own:
                job(bar)
        processes.wait()

    def _answer(self, ms: Sequence[Measurement], rows: range, bar: Any) -> None:
        """One slice; who does the last one of a measurement writes its record."""
        bar.set_postfix(set=ms[0].data.key, refresh=False)
        answer(ms, rows, [self._path(m, rows) for m in ms], bar)
        for m in ms:
            parts = [_whole(self._path(m, other)) for other in m.slices]
            if all(parts):
                answers, seconds = zip(*parts)
                self.store.add(record_of(m, answers, sum(seconds)))
                for other in m.slices:
                    self._path(m, other).unlink(missing_ok=True)

    def _path(self, m: Measurement, rows: range) -> Path:
        return self.store.folder / "unfinished" / f"{m.key}_{rows.start}.safetensors"


def _read_together(wanted: Sequence[Measurement]) -> list[list[Measurement]]:
    """What one pass over a set's images answers; apart from aware attacks, which take many times as long."""
    groups: dict[tuple[int, bool], list[Measurement]] = {}
    for m in wanted:
        groups.setdefault((id(m.data), m.aware), []).append(m)
    return list(groups.values())


def _whole(path: Path) -> tuple[Answers, float] | None:
    """A slice that is done, by whichever process."""
    try:
        tensors, about = load_tensors(path, run=path.stem)
    except (OSError, ValueError):  # not there yet
        return None
    answers = Answers(**tensors)
    return None if (answers.states == NOT_YET).any() else (answers, about["seconds"])
