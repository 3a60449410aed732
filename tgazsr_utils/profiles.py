"""Profiles: YAML files that say which notebooks a run is made of, and with which parameters."""

import ast
import contextlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import create_model

from tgazsr_utils.core.defences import find_defence
from tgazsr_utils.core.objectives import OBJECTIVES, find_objective, negated
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.core.settings import FinetuneSettings, Settings
from tgazsr_utils.datasets.descriptions import read_descriptions
from tgazsr_utils.datasets.layouts import existing_root, list_datasets
from tgazsr_utils.datasets.loading import class_texts
from tgazsr_utils.datasets.miniworld import TASKS
from tgazsr_utils.datasets.published_sets import DATASETS, DEFAULT_PROMPT, FURTHER, KNOWN
from tgazsr_utils.effects import without_effect
from tgazsr_utils.parameters import (
    NOTEBOOKS,
    TEXT,
    SettingsError,
    WorkbookSettings,
    named_weights,
    unknown_parameter,
    validate,
    yaml_value,
)
from tgazsr_utils.paths import NOTEBOOKS as FOLDER
from tgazsr_utils.paths import ROOT, resolve
from tgazsr_utils.runtime.weights import image_size_of, locate_weights, same_tokens
from tgazsr_utils.strict_yaml import YAML_ERRORS, load_yaml

PROFILES = FOLDER / "profiles"
_UNNAMED = {"output", "device", "processes"}  # parameters that a folder is not named after


class Profile(Settings):
    """A whole run."""

    description: str
    notebooks: list[str]
    fetch: bool = False  # what is not there of the image sets that parameters name
    minutes: dict[str, float] = {}  # by notebook, on two CPU cores: what is told where no earlier run is known
    parameters: dict[str, Any] = {}  # for every notebook that knows the name
    by_notebook: dict[str, dict[str, Any]] = {}
    without_weights: dict[str, Any] = {}  # parameters that take over where weights cannot be had; none: nothing does


def load_profile(name: str) -> Profile:
    """A file of notebooks/profiles. Raises SettingsError for one that is not there, or not as it should be."""
    path, there = PROFILES / f"{name}.yaml", sorted(p.stem for p in PROFILES.glob("*.yaml"))
    if name not in there:
        raise SettingsError(f"profile {name!r} is unknown; there are: {', '.join(there)}")
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except YAML_ERRORS as error:
        raise SettingsError(f"profile {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"profile {path} must hold names and values")
    try:
        profile = validate(Profile, values)
    except SettingsError as error:
        raise SettingsError(f"profile {name!r}: {error}") from None
    there = notebooks_there()
    for notebook in (*profile.notebooks, *profile.by_notebook, *profile.minutes):
        if notebook not in there:
            raise SettingsError(f"profile {name!r}: notebook {notebook!r} is unknown; there are: {', '.join(there)}")
    return profile


def select(profile: Profile, numbers: Sequence[str]) -> list[str]:
    """Names of the notebooks to run: the profile's own, or those with the given numbers (or names)."""
    return [_with_number(number) for number in numbers] or profile.notebooks


def _with_number(text: str) -> str:
    there, name = notebooks_there(), text.removesuffix(".ipynb")
    found = [name] if name in there else [other for other in there if other[:2] == text.zfill(2)]
    if not found:
        numbers = ", ".join(dict.fromkeys(name[:2] for name in there))
        raise SettingsError(f"notebook {text!r} is unknown; there are: {numbers}")
    if len(found) > 1:
        raise SettingsError(f"notebook {text!r} may be {' or '.join(found)}; say its name, or give it another number")
    return found[0]


def notebooks_there() -> list[str]:
    """The workbook's, then one's own: any other ``notebooks/NN_*.ipynb``."""
    found = {path.stem for folder in _folders() for path in folder.glob("[0-9][0-9]_*.ipynb")}
    return [*NOTEBOOKS, *sorted(found - NOTEBOOKS.keys())]


def _folders() -> list[Path]:
    return [FOLDER, ROOT / "notebooks"]  # of an installed wheel, its own and that of the working folder


def file_of(notebook: str) -> Path:
    paths = [folder / f"{notebook}.ipynb" for folder in _folders()]
    return next((path for path in paths if path.is_file()), paths[0])


class Cell(NamedTuple):
    kind: str  # "code" or "markdown"
    source: str
    tags: list[str]


def cells(notebook: str) -> list[Cell]:
    """A notebook's. Read as the JSON that it is: nbformat takes seconds to import, in every kernel."""
    try:
        read = json.loads(file_of(notebook).read_text(encoding="utf-8"))["cells"]
        return [Cell(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in read]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{file_of(notebook)} is no notebook of version 4: {error!r}") from None


def code_cells(notebook: str) -> list[Cell]:
    return [cell for cell in cells(notebook) if cell.kind == "code"]


def names_set_in(notebook: str) -> set[str]:
    """What its cells assign, but for that of parameters: a name in there is no slip, when cells are run again."""
    nodes = [node for cell in code_cells(notebook) if not cell.tags for node in _nodes(cell)]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _nodes(cell: Cell) -> list[ast.AST]:
    """Of a cell's syntax tree, magics aside; none of what is no Python, which stops where it is run."""
    try:
        return list(ast.walk(ast.parse(cell.source)))
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager  # slow to import, and rarely needed

        with contextlib.suppress(SyntaxError):
            return list(ast.walk(ast.parse(TransformerManager().transform_cell(cell.source))))
    return []


def default_parameters(notebook: str) -> dict[str, Any]:
    """What a notebook's cell tagged ``parameters`` assigns; before it, what that of a workbook it opens does."""
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.tags]
    if len(tagged) > 1:
        raise SettingsError(f"{notebook}: {len(tagged)} cells are tagged parameters; there should be one")
    opened = _opened_in(notebook)
    values = default_parameters(opened) if opened else {}
    try:
        lines = [line for cell in tagged for line in ast.parse(cell.source).body]
    except SyntaxError as error:
        problem = f"line {error.lineno} of its cell of parameters is no Python"
        raise SettingsError(f"{notebook}: {problem}: {error.msg}") from None
    for line in lines:
        try:
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0]
            values[target.id] = ast.literal_eval(line.value)
        except (ValueError, AttributeError):
            cell = f"{notebook}: its cell of parameters says {ast.unparse(line)[:120]!r}"
            raise SettingsError(f"{cell}, which is no name = value; a value is written out, such as '8/255'") from None
    return values


def settings_of(notebook: str) -> type[Settings]:
    """What a notebook takes.

    One of one's own takes what its cell of parameters assigns, of the types that the workbook's notebooks know of these
    names; besides that, where it opens one of these with ``open_workbook``, all that this one takes.
    """
    if notebook in NOTEBOOKS:
        return NOTEBOOKS[notebook]
    base = NOTEBOOKS.get(_opened_in(notebook), Settings)
    widest = NOTEBOOKS["04_evaluate_16_datasets"]  # whose methods may be none, and so on
    known = {name: field for model in (*NOTEBOOKS.values(), widest) for name, field in model.model_fields.items()}
    kind = lambda name: Annotated[(known[name].annotation, *known[name].metadata, None)] if name in known else Any
    own = default_parameters(notebook).items()
    fields = {name: (kind(name), value) for name, value in own if name not in base.model_fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names such as copy
        return create_model(notebook, __base__=base, **fields)


def _opened_in(notebook: str) -> str | None:
    """Whose parameters a notebook of one's own takes: the first argument of its ``open_workbook``."""
    names = [] if notebook in NOTEBOOKS else _first_arguments(notebook, "open_workbook")
    return next((name for name in names if name in NOTEBOOKS), None)


def _first_arguments(notebook: str, function: str) -> list[Any]:
    """Constants among them, of a notebook's calls of a function."""
    nodes = [node for cell in code_cells(notebook) for node in _nodes(cell)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.args]
    first = [call.args[0] for call in calls if ast.unparse(call.func).split(".")[-1] == function]
    return [argument.value for argument in first if isinstance(argument, ast.Constant)]


def cells_digest(notebook: str) -> str:
    """Names what a notebook runs and says: its cells' sources and tags, not outputs or what an editor adds."""
    return digest([list(cell) for cell in cells(notebook)])


def registered_in(notebook: str) -> set[str]:
    """Methods and defences that a notebook's own cells add, with ``@objective("NAME", ...)``, ``@defence("NAME")``."""
    return {*_first_arguments(notebook, "objective"), *_first_arguments(notebook, "defence")}


def layered(notebook: str, profile: Profile, given: Mapping[str, Any]) -> dict[str, Any]:
    """The profile's parameters that a notebook knows, then those given; not checked."""
    layers = profile.parameters | profile.by_notebook.get(notebook, {}) | dict(given)
    return {name: value for name, value in layers.items() if name in settings_of(notebook).model_fields}


def parameters_of(notebook: str, profile: Profile, output: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked parameters of one notebook: its own defaults, then the profile's, then those given."""
    model = settings_of(notebook)
    usual = {"output": output} if "output" in model.model_fields else {}
    values = default_parameters(notebook) | usual | layered(notebook, profile, given)
    try:
        root, keys = values.get("data_root"), values.get("testdata")
        if isinstance(root, str) and isinstance(keys, list) and not resolve(root).is_dir():
            raise SettingsError(f"there is no folder {root}; {_not_there(keys, root)}")
        return validate(model, values).model_dump(include=set(values))
    except ValueError as error:
        raise SettingsError(f"{notebook}: {error}") from None


def _not_there(keys: Sequence[str], root: str | None) -> str:
    """What is said of image sets that are missing, and how the published ones among them are fetched."""
    fetched = " ".join(key for key in keys if root and key in KNOWN)
    hint = f" (python -m tgazsr_utils.datasets fetch {fetched} --root {root})" if fetched else ""
    several, be = ("s", "are") if len(keys) > 1 else ("", "is")
    return f"image set{several} {', '.join(map(repr, keys))} {be} not there{hint}"


def check_choices(notebook: str, values: Mapping[str, Any]) -> None:
    """Methods and models that parameters name must be there before anything runs, not hours later."""
    if not issubclass(settings_of(notebook), WorkbookSettings):
        return
    try:
        image_size_of(values["arch"])
        for _, arch, weights in named_weights(values):
            if not str(weights).startswith("latest:"):  # made by a notebook before
                image_size_of(arch)
                locate_weights(arch, weights)
        own = registered_in(notebook)
        for method in [*values.get("methods", []), *(values.get("overrides") or {})]:
            if method not in own:
                find_objective(method)
        for name in values.get("defences", []):
            if name not in own:
                find_defence(name)
    except ValueError as error:
        raise SettingsError(f"{notebook}: {error}") from None


def named_sets(values: Mapping[str, Any]) -> list[str]:
    """Image sets that parameters name, that to tune on first, if there is a method to tune with."""
    testdata, tuned_on = values.get("testdata"), [values.get("dataset")] if values.get("methods", True) else []
    named = [*tuned_on, *(values.get("sets") or []), *(testdata if isinstance(testdata, list) else [])]
    return list(dict.fromkeys(filter(None, named)))


def check_sets(notebook: str, values: Mapping[str, Any]) -> None:
    """So must the image sets, and their prompts be as the text tower takes them."""
    if not issubclass(settings_of(notebook), WorkbookSettings):
        return
    root = values.get("data_root")
    try:
        there = list_datasets(root)
        gone = [key for key in named_sets(values) if key not in there]
        if gone := [key for key in gone if not (root and resolve(existing_root(root) / key).is_dir())]:
            raise ValueError(f"{_not_there(gone, root)}; there are: {', '.join(there) or 'none'}")
        check_prompts(validate(settings_of(notebook), values))
    except ValueError as error:
        raise SettingsError(f"{notebook}: {error}") from None


def check_prompts(settings: Any) -> list[str]:
    """Counts the tokens of every prompt that a notebook will ask for; lines that say which classes have the same.

    Raises ValueError for one that the text tower would cut, or that Comp-TGA cannot negate; for a class that has no
    description where a method reads them.
    """
    s, root, told = settings, settings.data_root, []
    archs = dict.fromkeys([s.arch, *(arch for _, arch, _ in named_weights(s.model_dump()))])
    needed = hasattr(s, "dataset") and getattr(s, "methods", True)
    parts = [(s.dataset, "train" if isinstance(s, FinetuneSettings) else "test")] if needed else []
    keys = getattr(s, "testdata", getattr(s, "sets", []))
    if not isinstance(keys, list):
        named = lambda key: key in DATASETS if keys else key not in FURTHER
        keys = [key for key in list_datasets(root) if root is None or named(key)]
    studies = getattr(s, "ablations", [])
    negates = "Comp-TGA" in getattr(s, "methods", []) or studies in ("cut", "all") or "attention" in studies
    read = {name for method in getattr(s, "methods", []) if method in OBJECTIVES for name in OBJECTIVES[method].reads}
    for key, split in dict.fromkeys([*parts, *((key, "test") for key in keys)]):
        try:
            names, prompts = class_texts(key, split, root, s.prompt, s.test_fraction)
        except ValueError:
            continue  # what cannot be read is said, or left out, where it is loaded
        _, prompts = with_labels(s, key, (), prompts)
        for group in [same_tokens(arch, prompts) for arch in archs][0]:  # each arch may refuse a prompt as too long
            told.append(f"{key}: classes that cannot be told apart, as their prompts are the same tokens: {group}")
        if split == "train" and "descriptions" in read:
            _check_descriptions(s, key, names)
        if negates and split == "train":
            try:
                same_tokens(s.arch, list(map(negated, prompts)))
            except ValueError as error:
                raise ValueError(f"method Comp-TGA: {error}") from None
    return told


def _check_descriptions(settings: Any, key: str, names: Sequence[str]) -> None:
    """Every class to tune on needs some, that the text tower does not cut; the mini-world has its own."""
    if settings.descriptions is not None:
        texts = read_descriptions(settings.descriptions, names)
        same_tokens(settings.arch, [text for of_class in texts for text in of_class])
    elif settings.data_root is not None:
        raise ValueError(f"{key} has no descriptions of its classes: -p descriptions FILE names JSON, class -> texts")


def with_labels(settings: Any, key: str, names: Sequence[str], prompts: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """A set's classes and their prompts, then those of the parameter ``labels`` that are not among them."""
    known = TASKS if settings.data_root is None else KNOWN
    template = settings.prompt or (known[key].prompt if key in known else DEFAULT_PROMPT)
    asked = {label: template.replace("{}", label) for label in getattr(settings, "labels", None) or []}
    new = {label: prompt for label, prompt in asked.items() if prompt.lower() not in map(str.lower, prompts)}
    return (*names, *new), (*prompts, *new.values())


def check_names(profile: Profile, given: Mapping[str, Any], notebooks: Sequence[str]) -> None:
    """Every parameter must be known to a notebook that will run; in a profile, to any notebook."""
    names_of = lambda chosen: {name: None for notebook in chosen for name in settings_of(notebook).model_fields}
    everywhere, here = names_of([*NOTEBOOKS, *profile.notebooks, *notebooks]), names_of(notebooks)
    here |= {"output": None}  # of the run
    for names, known in ((profile.parameters, everywhere), (profile.without_weights, everywhere), (given, here)):
        for name in names:
            if name not in known:
                owners = [notebook for notebook, model in NOTEBOOKS.items() if name in model.model_fields]
                if owners:
                    raise SettingsError(f"parameter {name!r} is one of {', '.join(owners)}, not of what is to run")
                raise SettingsError(unknown_parameter(name, known))
    for notebook, values in profile.by_notebook.items():
        for name in values:
            if name not in (known := settings_of(notebook).model_fields):
                raise SettingsError(f"{notebook}: {unknown_parameter(name, known)}")


def check_effect(given: Mapping[str, Any], parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """What is given must change something in one of the notebooks, whose checked ``parameters`` are by name."""
    idle = [without_effect(validate(settings_of(name), values)) for name, values in parameters.items()]
    for name, value in given.items():
        reasons = [of.get(name) for of, values in zip(idle, parameters.values()) if name in values]
        if reasons and all(reasons):
            raise SettingsError(f"parameter {name} = {value!r} has no effect: {reasons[0]}")


def given_value(name: str, text: str) -> Any:
    """What ``-p name text`` sets: YAML, but for parameters that are text the text as it is, or None for "null"."""
    kinds = [model.model_fields[name].annotation for model in NOTEBOOKS.values() if name in model.model_fields]
    if kinds and kinds[0] in TEXT:
        return None if text in ("null", "None", "") and kinds[0] is not str else text
    return yaml_value(name, text)


def folder_name(profile: str, changes: Mapping[str, Any]) -> str:
    """The folder below runs/ of a profile with these parameters changed: "mini", "mini-Alpha-0.1"."""
    named = {name: value for name, value in sorted(changes.items()) if name not in _UNNAMED}
    plain = lambda value: re.sub(r"[^A-Za-z0-9._]+", "_", str(value)).strip("_")
    name = "-".join([profile, *(f"{key}-{plain(value)}" for key, value in named.items())])
    return name if len(name) <= 80 else f"{name[:72]}-{digest(named)[:6]}"


def shown(path: Path) -> str:
    """As it is said: relative to the workbook, if it is there."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
