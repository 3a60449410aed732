"""What was measured: Records and checks of the attack, each in a file of its own that is never edited."""

import json
from pathlib import Path
from typing import Any, Generic, TypeVar

from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import Protocol, Settings
from tgazsr_utils.runtime.files import DamagedFile, write_json


class Record(Settings):
    """One measurement: a method's model on one set under one attack. Counts, not only rates; never edited."""

    key: str  # names all that the outcome depends on
    method: str
    model: str  # fingerprint of the weights
    precision: str = "fp32"  # of the model; of an attack, if it has another, see settings
    arch: str
    compiled: bool = False  # through torch.compile
    world: str
    dataset: str
    data: str  # fingerprint of the images (of files: their names and sizes), labels and prompts
    pixels: str | None = None  # names the pixels that were read: a file whose content changes under its name shows
    attack: str  # "none" or AttackSettings.label
    eps_255: float
    protocol: Protocol
    seed: int
    defence: str = ""  # at test time, that the model answers behind
    aware: bool = False  # the attack goes through it
    forwards: float = 1.0  # passes of the image encoder to answer, an image
    backwards: float = 0.0
    n: int
    available: int | None = None  # images in the whole part of the set, if not all were used
    left_out: int = 0  # images that could not be read
    published: bool = False  # the set is as published: number of images and classes, preprocessing, prompts
    correct: int
    hits: str  # one bit an image, packed, as hex: what paired comparisons need
    settings: dict[str, Any]  # of the attack
    training: dict[str, Any] = {}  # what made the weights, where it is known: method, settings, data, code
    code: str
    device: str
    batch: int | None = None  # images that were attacked at once; the last batch of a set is shorter
    seconds: float
    time: str  # UTC, ISO 8601

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct / self.n


class Outcome(Settings):
    """What one attack does to the images of a check."""

    attack: str
    eps_255: float
    correct: int
    loss: float | None  # mean cross-entropy, nats; None: not finite


class AttackCheck(Settings):
    """Of one model under attacks of one epsilon, norm and step size; never edited."""

    key: str  # names all that the outcome depends on
    model: str  # fingerprint of the weights
    precision: str
    world: str
    datasets: list[str]
    settings: dict[str, Any]  # of the attack that is measured
    n: int
    zero_gradients: int  # images whose pixels' gradient is zero or not finite
    outcomes: list[Outcome]
    problems: list[str]  # empty: passed
    code: str
    device: str
    seconds: float
    time: str  # UTC, ISO 8601


Kept = TypeVar("Kept", Record, AttackCheck)


class RecordStore(Generic[Kept]):
    """A folder with one JSON file a Record (or an AttackCheck), written in one step and never changed."""

    def __init__(self, folder: Path, kind: type[Kept] = Record):
        self.folder, self.kind = folder, kind

    @property
    def checks(self) -> "RecordStore[AttackCheck]":
        return RecordStore(self.folder / "checks", AttackCheck)

    def get(self, key: str) -> Kept | None:
        path = self.folder / f"{key}.json"
        return self._read(path) if path.exists() else None

    def all(self) -> list[Kept]:
        return [self._read(path) for path in sorted(self.folder.glob("[!.]*.json"))]

    def add(self, record: Kept) -> Kept:
        content = record.model_dump(mode="json")
        write_json(self.folder / f"{record.key}.json", content | {"checksum": digest(content)})
        return record

    def _read(self, path: Path) -> Kept:
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict) or content.pop("checksum", None) != digest(content):
                raise ValueError("its content is not what was written")
            if content.get("key") != path.stem:
                raise ValueError(f"it is that of {content.get('key')}")
            return self.kind.model_validate_json(json.dumps(content))
        except (ValueError, RecursionError) as error:  # also of pydantic, and of bytes that are no text
            reason = str(error).splitlines()[0]
            raise DamagedFile(f"record {path} is damaged ({reason}); remove it to measure again") from None
