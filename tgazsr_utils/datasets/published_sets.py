"""Published test sets: what they hold, where they come from, how they are shown.

The 16 are in published_sets.yaml; further ones, which no mean over the 16 is over, in further_sets.yaml.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

Preprocess = Literal["resize", "crop"]  # both sides to S; or the shorter side to 256/224 S, then the centre S x S
DEFAULT_ROOT = "data/sets"  # where published sets are looked for
DEFAULT_PROMPT = "This is a photo of a {}"
Prompt = Annotated[str, Field(pattern=r"\{\}")]
Count = Annotated[int, Field(gt=0)]


def clean_name(name: str, separators: str = "_-/") -> str:
    """A class name as prompts have it: lower case, ``separators`` to spaces, no leading "n02085620-"."""
    name = re.sub(r"^n\d{8}[-_. ]", "", name)
    return re.sub(f"[{re.escape(separators)}]", " ", name).strip().lower()


def without_running_numbers(names: Sequence[str]) -> list[str]:
    """Class names without a number before each, such as "017.", if those only count: from 0 or 1, or with zeros."""
    found = [re.fullmatch(r"(\d+)[-_. ]+(.*\w.*)", name) for name in names]
    numbers, rest = ([one[i] if one else "" for one in found] for i in (1, 2))
    if not all(found) or len({*rest}) < len(names):
        return list(names)
    counted = sorted(map(int, numbers))
    padded = len({*map(len, numbers)}) == 1 and any(number.startswith("0") for number in numbers)
    counts = len({*counted}) == len(names) and (padded or counted[0] < 2 and counted[-1] - counted[0] < len(names))
    return rest if counts else list(names)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DatasetSpec:
    """One published set; ``images`` and ``classes`` count the split it is tested on."""

    title: str
    split: str
    images: Count
    classes: Count
    needs: Annotated[tuple[str, ...], Field(min_length=1)]  # files and folders below the data root, as published
    also: tuple[str, ...] = ()  # other names of its folder, such as that of its archive
    torchvision: str | None = None  # its class in torchvision.datasets, which fetches it and, without folders, reads it
    test: Mapping[str, Any] = field(default_factory=dict)  # that class's arguments for the test part
    train: Mapping[str, Any] | None = None  # and for a part to tune on, if there is one
    folders: str | None = None  # where the published layout is class folders, which are then read as such
    train_folders: str | None = None  # and those to tune on
    preprocess: Preprocess = "crop"
    prompt: Prompt = DEFAULT_PROMPT
    names: Mapping[str, str] = field(default_factory=dict)  # raw class name -> name in the prompt; others are cleaned
    labels: Mapping[str, str] = field(default_factory=dict)  # raw class name -> its name where that is no whole prompt
    separators: str = "_-/"  # characters of a raw name that are spaces in the prompt
    numbered: bool = False  # class folders are called by the numbers of ImageNet's 1000 classes
    name_edits: Mapping[re.Pattern[str], str] = field(default_factory=dict)  # what to replace before a name is cleaned
    gigabytes: float  # to download
    source: str
    licence: str
    by_hand: str = ""  # which file goes where, when nothing can be downloaded by program

    @property
    def folder(self) -> str:
        return self.needs[0].split("/")[0]

    @property
    def below(self) -> tuple[str, ...]:
        """What it needs, below its folder."""
        return tuple(need.partition("/")[2] for need in self.needs)

    def label(self, raw: str) -> str:
        """What to call a class outside of the published prompts."""
        return self.labels.get(raw) or self.class_name(raw)

    def class_name(self, raw: str) -> str:
        """How the published prompts name a class that files name ``raw``."""
        if raw in self.names:
            return self.names[raw]
        for pattern, replacement in self.name_edits.items():
            raw = pattern.sub(replacement, raw)
        return clean_name(raw, self.separators)


def read_specs(path: Path) -> dict[str, DatasetSpec]:
    """The sets that a YAML file describes, in its order. Raises ValueError, in one line, for a damaged entry."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, DatasetSpec]).validate_python(entries)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where, value = ".".join(map(str, first["loc"])), f"{first['input']!r:.60}"
        raise ValueError(f"{path}: {where or 'the file'} = {value}: {first['msg']}") from None


DATASETS = read_specs(Path(__file__).with_suffix(".yaml"))  # the 16
FURTHER = read_specs(Path(__file__).with_name("further_sets.yaml"))
KNOWN = DATASETS | FURTHER


def in_means(keys: Iterable[str]) -> list[str]:
    """Those of sets that a mean is over: no further ones, unless there are no others."""
    keys = list(keys)
    return [key for key in keys if key not in FURTHER] or keys
