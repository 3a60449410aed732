"""Names of what a result depends on: the model, the images, and the code that made it."""

import ast
import io
import tokenize
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

from torch import Tensor

from tgazsr_utils.core.images import PLUMBING, ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import digest

_PACKAGE = Path(__file__).parents[1]
# Read when the package is imported: what names a result is the code that ran, not what an editor has made of it since.
SOURCES = {
    path.relative_to(_PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.yaml")])
}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_EVERYWHERE = ("core/", "datasets/")  # whole rooms that every number comes from


_known: WeakKeyDictionary[Clip | ImageSet, tuple[list, str]] = WeakKeyDictionary()


def fingerprint(of: Clip | ImageSet) -> str:
    """Equal for equal models (weights and architecture), or for equal image sets (images, labels and prompts).

    Images that are read as needed are told by their files' names and sizes.
    """
    if isinstance(of, Clip):
        weights = list(of.model.state_dict().values())
        state = [(value.data_ptr(), value._version) for value in weights]  # the latter counts in-place changes
        parts = (of.arch, *weights)
    else:
        state = []
        images = [of.images] if isinstance(of.images, Tensor) else of.images.identity()
        stamp = [PLUMBING] if of.world == PLUMBING else []  # what is measured for show is no record of the real thing
        parts = (of.key, *images, of.labels, list(of.prompts), *stamp)
    if of not in _known or _known[of][0] != state:
        _known[of] = state, digest(*parts)
    return _known[of][1]


def data_key(data: ImageSet) -> str:
    """Names an image set in the keys of the store: as ``fingerprint``, with the times of files that are read later.

    A fingerprint is the same on every machine; a key changes with files that are replaced by others of the same size.
    """
    times = [] if isinstance(data.images, Tensor) else data.images.modified()
    return digest(fingerprint(data), times) if times else fingerprint(data)


def code_version(asking: str | None = None) -> str:
    """Names the source that the results of a module (its ``__name__``) depend on; None: all of the package.

    These are the rooms ``core`` and ``datasets``, the module, and what it imports from its own room, directly or not;
    of each what is run, without docstrings and comments.
    """
    return _version(asking, tuple(SOURCES.items()))


@lru_cache(maxsize=64)
def _version(asking: str | None, sources: tuple[tuple[str, str], ...]) -> str:
    texts = dict(sources)
    if asking is None:
        return digest({path: _what_runs(path, text) for path, text in sources})
    found = {path for path in texts if path.startswith(_EVERYWHERE)}
    room = asking.split(".")[1:-1]
    waiting = ["/".join(asking.split(".")[1:]) + ".py"]
    while waiting:
        path = waiting.pop()
        found.add(path)
        near = [other for other in _imports(texts[path]) if other in texts and other.split("/")[:-1] == room]
        waiting += [other for other in near if other not in found]
    return digest({path: _what_runs(path, texts[path]) for path in sorted(found)})


@lru_cache(maxsize=256)
def _what_runs(path: str, text: str) -> list[str]:
    """The lines of a module without docstrings, comments and blank lines; of another file, all lines."""
    lines = text.splitlines()
    if not path.endswith(".py"):
        return lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, _WITH_DOCSTRING) and ast.get_docstring(node, clean=False) is not None:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            lines[first:last] = [lines[first][: node.body[0].col_offset], *(last - first - 1) * [""]]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.rstrip() for line in lines if line.strip()]


def _imports(source: str) -> list[str]:
    """Paths of the package's modules that this source may import, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tgazsr_utils"):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return ["/".join(name.split(".")[1:]) + ".py" for name in names]
