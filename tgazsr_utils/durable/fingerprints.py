"""Names of what a result depends on: the model, the images, and the code that made it."""

import ast
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

    These are the rooms ``core`` and ``datasets``, the module, and what it imports from its own room, directly or not.
    """
    return _version(asking, tuple(SOURCES.items()))


@lru_cache(maxsize=64)
def _version(asking: str | None, sources: tuple[tuple[str, str], ...]) -> str:
    texts = dict(sources)
    if asking is None:
        return digest(sources)
    found = {path for path in texts if path.startswith(_EVERYWHERE)}
    room = asking.split(".")[1:-1]
    waiting = ["/".join(asking.split(".")[1:]) + ".py"]
    while waiting:
        path = waiting.pop()
        found.add(path)
        near = [other for other in _imports(texts[path]) if other in texts and other.split("/")[:-1] == room]
        waiting += [other for other in near if other not in found]
    return digest({path: texts[path] for path in sorted(found)})


def _imports(source: str) -> list[str]:
    """Paths of the package's modules that this source may import, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tgazsr_utils"):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return ["/".join(name.split(".")[1:]) + ".py" for name in names]
