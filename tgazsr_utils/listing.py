"""What there is (``--list``), each with its meaning from where that stands in the code and the notebooks."""

import ast
import contextlib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tgazsr_utils.core.attacks import ATTACKS
from tgazsr_utils.core.defences import DEFENCES
from tgazsr_utils.core.objectives import OBJECTIVES, PRESET
from tgazsr_utils.core.settings import Settings
from tgazsr_utils.measuring.autoattack import VERSIONS
from tgazsr_utils.parameters import NOTEBOOKS, SettingsError, validate
from tgazsr_utils.profiles import PROFILES, cells, code_cells, load_profile, notebooks_there, settings_of
from tgazsr_utils.runtime.plugins import PluginSettings
from tgazsr_utils.start_page import title_and_question

WIDTH = 100
Entries = Iterator[tuple[str, str]]  # name, meaning


def _profiles() -> Entries:
    for path in sorted(PROFILES.glob("*.yaml")):
        try:
            profile = load_profile(path.stem)
            yield path.stem, f"{profile.description} [{' '.join(name[:2] for name in profile.notebooks)}]"
        except SettingsError as error:
            yield path.stem, str(error)


def _notebooks() -> Entries:
    for name in notebooks_there():
        try:
            yield name, question_of(name)
        except SettingsError as error:
            yield name, str(error)


def question_of(notebook: str) -> str:
    """What a notebook says that it asks, or else its title."""
    return title_and_question(_first_text(notebook))[1]


def title_of(notebook: str) -> str:
    return title_and_question(_first_text(notebook))[0]


def _first_text(notebook: str) -> str:
    return next((cell.source for cell in cells(notebook) if cell.kind == "markdown"), notebook)


def _methods() -> Entries:
    for name, one in OBJECTIVES.items():
        own = ", ".join(f"{key} {value}" for key, value in one.preset.items() if PRESET.get(key) != value)
        yield name, _first_line(one.terms) + (f" [published with {own}]" if own else "")


def _attacks() -> Entries:
    for name, one in ATTACKS.items():
        parts = ", then ".join(VERSIONS.get(name, ()))
        yield name, f"AutoAttack's {parts} (Croce & Hein 2020)" if parts else _first_line(one.run)


def _defences() -> Entries:
    for name, one in DEFENCES.items():
        yield name, _first_line(one.run)


def _first_line(function: Callable) -> str:
    function = getattr(function, "func", function)  # a partial's
    text = inspect.getdoc(function)
    if text is None and inspect.isfunction(function) and function.__name__ != "<lambda>":  # python -OO drops it
        text = ast.get_docstring(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0])
    return (text or "not described").split("\n\n")[0]


def _parameters() -> Entries:
    models, meanings = {}, {}
    for notebook in sorted(notebooks_there(), key="04_evaluate_16_datasets".__ne__):  # the one that says most, first
        with contextlib.suppress(SettingsError):  # which is told where that notebook is to run
            models[notebook] = settings_of(notebook)
            meanings = _meanings(notebook, models[notebook]) | meanings
    for name in dict.fromkeys(name for model in models.values() for name in model.model_fields):
        takers = {book[:2]: model.model_fields[name] for book, model in models.items() if name in model.model_fields}
        kind = max((allowed(field.annotation, field.metadata) for field in takers.values()), key=len)
        meaning = re.sub(r"\bNone\b", "null", meanings.get(name, ""))
        numbers = sorted(takers)
        in_a_row = len(numbers) > 2 and int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1
        books = f"{numbers[0]}-{numbers[-1]}" if in_a_row else " ".join(numbers)
        yield name, f"{meaning} ({kind}; {books})"


def _meanings(notebook: str, model: type[Settings]) -> dict[str, str]:
    """The comments beside the fields of its settings; of a notebook of one's own, those of its cell of parameters."""
    if notebook not in NOTEBOOKS:
        tagged = [cell.source for cell in code_cells(notebook) if "parameters" in cell.tags]
        return {name: text for source in tagged for name, text in _comments(source).items()}
    parts = [part for part in reversed(model.__mro__) if issubclass(part, Settings)]
    return {name: text for part in parts for name, text in _comments(inspect.getsource(part)).items()}


SECTIONS: dict[str, tuple[str, Callable[[], Entries]]] = {
    "profiles": ("./run_all.sh NAME; their notebooks in brackets", _profiles),
    "notebooks": ("./run_all.sh mini NUMBER, and their questions; any notebooks/NN_*.ipynb is one", _notebooks),
    "methods": ("-p methods [NAME, ...]", _methods),
    "attacks": ("-p attack NAME", _attacks),
    "defences": ("-p defences [NAME, ...] of notebook 04", _defences),
    "parameters": ("-p NAME VALUE; in brackets what it may be, and the notebooks that know it", _parameters),
}


def show_list(section: str = "all", plugins: str | list[str] | None = None) -> int:
    """Prints one section, or all, with what plugins add."""
    validate(PluginSettings, {"plugins": plugins or []})
    for name, (option, entries) in SECTIONS.items():
        if section in (name, "all"):
            print(f"{name} ({option})")
            for entry, meaning in entries():
                print(paragraph(entry, meaning))
            print()
    return 0


def paragraph(name: str, text: str) -> str:
    indent = " " * 24
    first = f"  {name}".ljust(len(indent)) if len(name) < len(indent) - 3 else f"  {name}\n{indent}"
    wrapped = textwrap.wrap(" ".join(text.split()), WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    return first + f"\n{indent}".join(wrapped)


def _comments(source: str) -> dict[str, str]:
    """Name -> the comment beside its assignment, or else above it; of a class's body or of a cell."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    text = {token.start[0]: token.string.lstrip("# ") for token in tokens}
    alone = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
    body = ast.parse(source).body
    found = {}
    for line in body[0].body if isinstance(body[0], ast.ClassDef) else body:
        target = line.target if isinstance(line, ast.AnnAssign) else (getattr(line, "targets", None) or [None])[0]
        if isinstance(target, ast.Name):
            above = [text[line.lineno - 1]] if line.lineno - 1 in alone else []
            for comment in [text[line.end_lineno]] if line.end_lineno in text else above:
                found[target.id] = comment
    return found


_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
_BOUNDS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}


def allowed(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """What an annotation says of a value."""
    parts = get_args(kind)
    if get_origin(kind) is Annotated:
        return allowed(parts[0], [one for given in parts[1:] for one in getattr(given, "metadata", [given])])
    if get_origin(kind) is Literal:
        return " or ".join(map(str, parts))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(allowed, parts))
    if get_origin(kind) is list:
        return f"list of {allowed(*parts)}"
    if get_origin(kind) is dict:
        return "mapping"
    limits = {name: getattr(one, name) for name in _BOUNDS for one in metadata if hasattr(one, name)}
    bounds = [f"{_BOUNDS[name]} {limit:g}" for name, limit in limits.items() if limit < 2**63]
    return " ".join([_KINDS.get(kind, "any value"), *bounds])
