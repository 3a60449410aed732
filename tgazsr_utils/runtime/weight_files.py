"""What a file of weights holds, recognised by its content. No code of a file is ever run."""

import functools
import pickle
import sys
import tarfile
import types
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tgazsr_utils.runtime.files import DamagedFile, load_tensors

TORCHSCRIPT = "a TorchScript archive, which is code; save its state_dict() as safetensors where you trust it"
_ARCHIVE = "an archive of files; unpack it first"
_RUNS_CODE = "reading this file would run code that it brings along, which is refused"
_BEGINNINGS = {  # of files that are no weights
    b"<": "a web page, as some servers send in place of a download",
    b"version https://git-lfs": "a pointer of Git LFS, not the weights it stands for: git lfs pull fetches them",
    b"\x1f\x8b": "packed by gzip; unpack it first",
    b"BZh": "packed by bzip2; unpack it first",
    b"\xfd7zXZ": "packed by xz; unpack it first",
}
_KINDS = {  # a part of their tensors' names -> weights of other kinds
    "lora_": "LoRA parts only; merge them into the weights they belong to",
    "vision_model.": "a transformers model; take the same weights as open_clip has them, or convert it",
}
_ANCHOR = "class_embedding"  # of every image encoder that the workbook reads
_TEXT = ("positional_embedding", "text_projection", "ln_final.weight", "token_embedding.weight")
_COPIES = ("ema", "orig", "frozen", "teacher", "init")  # in names: not the weights that were trained, or not the last


class _Data(dict):
    """Stands in for any class that a file names: it keeps what it is given, for the search, and does nothing."""

    dump_patches = False  # PyTorch asks modules in files of before version 1.6
    __hash__ = object.__hash__  # it may be a key

    def __init__(self, *args: Any, **_named: Any) -> None:
        super().__init__(enumerate(args))

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {"state": state})

    def __call__(self, *_args: Any, **_named: Any) -> Any:
        raise ValueError(_RUNS_CODE)

    def append(self, value: Any) -> None:
        self[len(self)] = value


class _Function(_Data):
    """Stands in for a function, or a class named like one: harmless as long as the file does not call it."""

    def __init__(self, *_args: Any, **_named: Any) -> None:
        raise ValueError(_RUNS_CODE)


def _dictionary(items: Iterable[tuple[Any, Any]] = ()) -> _Data:
    made = _Data()
    made.update(items)
    return made


_REBUILT = {  # the only functions that are called
    "collections.OrderedDict": _dictionary,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _kind, args, _state: rebuild(*args),
}
_INERT = {"_codecs.encode", "copyreg._reconstructor"}  # functions that only make data


class _Unpickler(pickle._Unpickler):  # in Python: the one in C takes as much memory as a damaged index says
    """Calls nothing that a file names but what rebuilds tensors, and imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # Python 2's names
        full = f"{module}.{name}"
        if full in _REBUILT:
            return functools.partial(_REBUILT[full])  # a new one, as a file may set attributes
        if full == "builtins.getattr":  # of a class within a class, or of an enumeration
            return lambda *_: _Data
        known = getattr(sys.modules.get(module), name, None)
        harmless = full in _INERT or module.split(".")[0] == "numpy" or module == "torch._utils"
        return _Data if harmless or isinstance(known, type) or name[:1].isupper() else _Function


_PICKLE = types.SimpleNamespace(  # what torch.load takes for the pickle module
    __name__="pickle", Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load()
)


class Found(NamedTuple):
    """Weights of a CLIP, or of its image encoder, in a file."""

    place: str  # such as "vision_encoder_state_dict", or "state_dict.clip_model"; "": the file itself
    tensors: dict[str, Tensor]  # by open_clip's names, the image encoder's with "visual." before them
    whole: bool  # has the text tower, too
    beside: tuple[str, ...]  # what else lies in the same dictionary, by the first parts of its names

    @property
    def is_a_copy(self) -> bool:
        return any(word in self.place.replace("_orig_mod", "").lower() for word in _COPIES)


def is_safetensors(path: Path) -> bool:
    """By its header, whatever the file is called."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def read_weight_file(path: Path) -> Any:
    """What ``torch.save``, safetensors or the workbook has written.

    Objects other than tensors, numbers, texts and their containers come back as empty mappings. Raises ValueError for
    a file of another kind or one that would run code, DamagedFile for a damaged one.
    """
    if is_safetensors(path):
        with safe_open(path, "pt") as file:
            ours = "digest" in (file.metadata() or {})
        return load_tensors(path)[0] if ours else load_file(path)
    if kind := _foreign(path):
        raise ValueError(f"this file is {kind}")
    try:
        # By its path, PyTorch would go by the suffix.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of classes whose source differs
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except Exception as error:  # whatever a file of another kind makes torch and pickle do
        if str(error) == _RUNS_CODE:
            raise ValueError(_RUNS_CODE) from None
        raise DamagedFile("this file is no PyTorch checkpoint, or is damaged") from error


def _foreign(path: Path) -> str | None:
    """What a file is, if that is known and no checkpoint of weights."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return TORCHSCRIPT
        return None if any(name.endswith("data.pkl") for name in names) else _ARCHIVE
    with open(path, "rb") as file:
        beginning = file.read(64).lstrip()
    if kind := next((kind for start, kind in _BEGINNINGS.items() if beginning.startswith(start)), None):
        return kind
    return _ARCHIVE if tarfile.is_tarfile(path) else None  # which PyTorch would unpack, as it wrote files before 2017


def find_weights_in(content: Any) -> list[Found]:
    """All CLIPs and image encoders in a file, under any name, the trained ones first.

    Raises ValueError, which says what is there instead, if there is none.
    """
    dictionaries = list(_dictionaries(content))
    found = [one for place, tensors in dictionaries for one in _clips_in(place, tensors)]
    if not found:
        names = [name for _, tensors in dictionaries for name in tensors]
        if kind := next((kind for part, kind in _KINDS.items() if any(part in name for name in names)), None):
            raise ValueError(f"this file holds {kind}")
        some = f"; among its {len(names)} tensors is {names[0]}" if names else ""
        raise ValueError(f"this file holds no weights of an image encoder by name (no {_ANCHOR}){some}")
    distinct: list[Found] = []
    for one in sorted(found, key=lambda one: (one.is_a_copy, not one.whole)):
        if not any(_equal(one.tensors, other.tensors) for other in distinct):
            distinct.append(one)
    return distinct


def _dictionaries(
    content: Any, place: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in a file that has tensors by name; a pickled module counts as its state dictionary."""
    seen = set() if seen is None else seen
    if id(content) in seen:
        return
    seen.add(id(content))
    if isinstance(content, dict) and "_parameters" in content:
        content = _state_of(content)
    pairs = list(content.items() if isinstance(content, dict) else enumerate(content))
    if tensors := {name: value for name, value in pairs if isinstance(name, str) and isinstance(value, Tensor)}:
        yield place, tensors
    for name, value in pairs:
        if isinstance(value, (dict, list, tuple)):
            yield from _dictionaries(value, f"{place}.{name}" if place else str(name), seen)


def _state_of(module: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a pickled module and of those within, by their names in a state dictionary."""
    state = dict(module["_parameters"]) | dict(module.get("_buffers", {}))
    for name, inner in module.get("_modules", {}).items():
        state |= {f"{name}.{key}": value for key, value in _state_of(inner).items()} if inner else {}
    return state


def _clips_in(place: str, tensors: dict[str, Tensor]) -> Iterator[Found]:
    """The CLIPs in one dictionary: what lies beside ``class_embedding`` under the same prefix."""
    for anchor in (name for name in tensors if name == _ANCHOR or name.endswith(f".{_ANCHOR}")):
        prefix = anchor.removesuffix(_ANCHOR)
        outer = prefix.removesuffix("visual.") if f".{prefix}".endswith(".visual.") else prefix
        inner = {name.removeprefix(outer): value for name, value in tensors.items() if name.startswith(outer)}
        if prefix == outer:  # an image encoder under names of its own
            inner = {f"visual.{name}": value for name, value in inner.items()}
        if "visual.conv1.weight" in inner:
            whole = all(name in inner or f"text.{name}" in inner for name in _TEXT)
            others = {name.split(".")[0]: None for name in tensors if not name.startswith(outer)}
            yield Found(".".join(filter(None, [place, outer.rstrip(".")])), inner, whole, tuple(others))


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def said_of(found: Sequence[Found], left: Sequence[str]) -> str:
    """One line on what of a file is loaded, the first, what else would fit, and what is ``left`` beside it."""
    first, *others = found
    what = "all weights" if first.whole else "image encoder"
    line = f"{what}, from {first.place}" if first.place else what
    if others:
        line += f"; not from {', '.join(other.place or 'the file itself' for other in others)}, which fits as well"
    parts = {part for other in others for part in other.place.split(".")}
    if left := [name for name in (*first.beside, *left) if name not in parts]:
        line += f"; not loaded: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}"
    return line
