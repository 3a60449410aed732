"""What tuning at an Alpha and Beta led to: measured on a few held-out images, and kept in the run's folder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.settings import AttackSettings, FinetuneSettings
from tgazsr_utils.measuring import measure
from tgazsr_utils.measuring.loss_mixture import TGA
from tgazsr_utils.measuring.records import Record, RecordStore
from tgazsr_utils.measuring.tables import paired_difference, to_frame
from tgazsr_utils.runtime.files import write_atomic
from tgazsr_utils.runtime.fingerprints import code_version, fingerprint
from tgazsr_utils.runtime.runs import Run

IMAGES = 100
AT_ONCE = 20  # images between two calls of ``watch``


@dataclass(frozen=True)
class Outcome:
    """Of one model that TGA-ZSR has tuned."""

    robust: Record
    clean: Record

    @property
    def place(self) -> tuple[float, float]:
        """Alpha and Beta."""
        settings = self.robust.training["settings"]
        return settings["Alpha"], settings["Beta"]

    def __str__(self) -> str:
        """Such as "41 [32, 51] robust / 88 [80, 93] clean": percent, with 95 % Wilson intervals over images."""
        rows = to_frame([self.robust, self.clean]).itertuples()
        return " / ".join(f"{row.accuracy:.0f} [{row.low:.0f}, {row.high:.0f}] {row.kind}" for row in rows)


class _Bar:
    """What ``measure.answer`` tells of its progress."""

    def __init__(self, total: int, watch: Callable[[int, int], None]):
        self.done, self.total, self.watch = 0, total, watch

    def update(self, n: int) -> None:
        self.done += n
        self.watch(self.done, self.total)


class Tried:
    """The outcomes of a run: records in its store, and in ``records/05_tried.jsonl`` those that were tried here."""

    def __init__(self, run: Run, data: ImageSet, attack: AttackSettings):
        self.data, self.attack, self.store = data.subset(IMAGES), attack, RecordStore(run.stored_records)
        self.file = run.folder / "records" / "05_tried.jsonl"

    def measure(self, clip: Clip, seed: int, watch: Callable[[int, int], None]) -> Outcome:
        """Measures a tuned model, unless that is done; ``watch`` is told images done, and in all, and may raise."""
        bar = _Bar(2 * len(self.data), watch)
        wanted = [measure.Measurement(clip, self.data, a, method=TGA.name, seed=seed) for a in (self.attack, None)]
        outcome = Outcome(*(self.store.get(m.key) or self.store.add(_answered(m, bar)) for m in wanted))
        known = self._read()
        if outcome.robust.key not in known:
            self._write(known | {record.key: record for record in (outcome.robust, outcome.clean)})
        return outcome

    def alike(self, settings: FinetuneSettings, train: ImageSet) -> list[Outcome]:
        """What differs from ``settings`` and from one another in Alpha and Beta alone, in the order it was tried.

        Raises ValueError, one line, if the file is damaged.
        """
        trained = _but_for_the_place({"settings": settings.model_dump()}), fingerprint(train)
        same = {"data": fingerprint(self.data), "code": code_version(measure.__name__)}
        found: dict[str, list[Record]] = {"none": [], self.attack.label: []}
        for r in self._read().values():
            attacked_alike = r.attack == "none" or r.settings == self.attack.model_dump()
            measured_alike = attacked_alike and all(getattr(r, name) == value for name, value in same.items())
            if measured_alike and (_but_for_the_place(r.training), r.training.get("data")) == trained:
                found.setdefault(r.attack, []).append(r)
        clean = {r.model: r for r in found["none"]}
        outcomes = [Outcome(r, clean[r.model]) for r in found[self.attack.label] if r.model in clean]
        return list({outcome.place: outcome for outcome in outcomes}.values())

    def _read(self) -> dict[str, Record]:
        if not self.file.exists():
            return {}
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
            records = [Record.model_validate_json(line) for line in lines]
        except ValueError as error:  # pydantic's, and bytes that are no text
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.file} is damaged ({reason}); remove it to begin the list anew") from None
        return {record.key: record for record in records}

    def _write(self, records: Mapping[str, Record]) -> None:
        text = "".join(record.model_dump_json() + "\n" for record in records.values())
        write_atomic(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _answered(m: measure.Measurement, bar: _Bar) -> Record:
    parts = [range(start, min(start + AT_ONCE, len(m.data))) for start in range(0, len(m.data), AT_ONCE)]
    answers, seconds = zip(*(measure.answer([m], rows, bar=bar)[0] for rows in parts))
    return measure.record_of(m, answers, sum(seconds))


def _but_for_the_place(training: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in training["settings"].items() if name not in ("Alpha", "Beta")}


def verdict(own: Outcome, published: Outcome) -> str:
    """How two outcomes on the same images differ, and whether so few can tell."""
    words, told = [], False
    for kind in ("robust", "clean"):
        mean, low, high = paired_difference([getattr(own, kind)], [getattr(published, kind)])
        words.append(f"{kind} {round(mean):+d} [{round(low):+d}, {round(high):+d}]")
        told |= low > 0 or high < 0
    sure = "the interval leaves out zero" if told else f"no difference that {own.robust.n} images can tell"
    return f"yours minus published, image by image: {', '.join(words)}: {sure}"
