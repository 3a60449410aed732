"""Files of one's own that add methods, attacks, defences: loaded where parameters name them, known by their text."""

import importlib.util
import sys
import traceback
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, model_validator

from tgazsr_utils.core.attacks import ATTACKS
from tgazsr_utils.core.defences import DEFENCES
from tgazsr_utils.core.objectives import OBJECTIVES
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import ADDED_ATTACKS, Settings
from tgazsr_utils.paths import resolve

# What a plugin may add to.
REGISTRIES: dict[str, dict[str, Any]] = {"method": OBJECTIVES, "attack": ATTACKS, "defence": DEFENCES}


class Plugin(NamedTuple):
    source: str  # as it was when it was loaded
    added: dict[tuple[str, str], Any]  # (registry, name) -> entry


_loaded: dict[Path, Plugin] = {}


class PluginSettings(Settings):
    """Has plugins loaded before any value is looked at, which may be a name that one of them adds."""

    # Python files that add methods, attacks or defences when they are loaded, such as [my_method.py]
    plugins: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []

    @model_validator(mode="before")
    @classmethod
    def _load_plugins(cls, values: Any) -> Any:
        given = values.get("plugins") if isinstance(values, Mapping) else None
        for name in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
            if isinstance(name, str):
                load(name)
        return values


def load(name: str) -> None:
    """Runs a Python file, once for each text it has. Raises ValueError, one line, and leaves what was registered."""
    try:
        path = resolve(name)
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"plugins: {name!r} cannot be read: {reason}") from None
    if path in _loaded and _loaded[path].source == source:
        return
    before = {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    try:
        for kind, entry_name in _loaded[path].added if path in _loaded else ():
            REGISTRIES[kind].pop(entry_name, None)
        _run(name, path, source)
        _loaded[path] = Plugin(source, _added(name, path, before))
    except BaseException:
        for kind, registry in REGISTRIES.items():
            registry.clear()
            registry.update(before[kind])
        raise
    ADDED_ATTACKS.clear()
    ADDED_ATTACKS.update(name for plugin in _loaded.values() for kind, name in plugin.added if kind == "attack")


def source_of(entry: Any) -> str | None:
    """The text of the file that has added this entry of a registry; None: no plugin has."""
    return next((p.source for p in _loaded.values() if any(entry is own for own in p.added.values())), None)


class _FromSource(SourceFileLoader):
    """Takes the file as it is now and leaves no compiled copy, which is told by whole seconds from a changed file."""

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


def _run(name: str, path: Path, source: str) -> None:
    module_name = f"plugin_{digest(str(path))}"
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_FromSource(module_name, str(path)))
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None) or 1
        problem = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"plugins: {name!r} fails in line {line}: {type(error).__name__}: {problem}") from None


def _added(name: str, path: Path, before: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """What it has registered: something, of the right type, under names of its own."""
    own = _loaded[path].added if path in _loaded else {}
    added = {}
    for kind, registry in REGISTRIES.items():
        usual = type(next(iter(before[kind].values())))
        for entry_name, entry in registry.items():
            earlier = before[kind].get(entry_name)
            if entry is earlier:
                continue
            if earlier is not None and own.get((kind, entry_name)) is not earlier:
                other = next(
                    (p for p, plugin in _loaded.items() if plugin.added.get((kind, entry_name)) is earlier), None
                )
                where = other or "the workbook, or in a cell"
                raise ValueError(
                    f"plugins: {name!r} adds the {kind} {entry_name!r}, which is there already, of {where}"
                )
            if type(entry) is not usual:
                problem = f"{type(entry).__name__}; it should be {usual.__module__}.{usual.__name__}"
                raise ValueError(f"plugins: {name!r} adds the {kind} {entry_name!r} as a {problem}")
            added[kind, entry_name] = entry
    if not added:
        raise ValueError(
            f"plugins: {name!r} registers nothing; a method is a function under @objective(NAME), an attack an entry "
            "of core.attacks.ATTACKS"
        )
    return added
