"""Where the workbook lies, and what relative paths are relative to."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / "notebooks").is_dir()  # as a wheel puts it; else this is the repository, beside its notebooks
ROOT = Path.cwd() if _INSTALLED else _PACKAGE.parent  # runs and what a person names with a relative path
NOTEBOOKS, DATA = ((_PACKAGE if _INSTALLED else ROOT) / name for name in ("notebooks", "data"))  # what comes with it


def resolve(path: str | Path) -> Path:
    """A path as given if absolute, else under the workbook's folder, whatever the working directory is.

    Of an installed wheel, it is under the directory that was the working one when this was imported. Raises ValueError
    for text that can be no path: too long, with a NUL, not UTF-8, or below the home folder ("~") of somebody who has
    none.
    """
    try:
        found = (ROOT / Path(path).expanduser()).resolve()
        longest = max(len(part.encode()) for part in found.parts)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"path {str(path)[:120]!r}: {error}") from None
    if longest > 255 or len(str(found).encode()) > 4000:
        raise ValueError(f"path {str(path)[:120]!r}... is too long for one: {len(str(path))} characters")
    return found


def files_below(folder: Path) -> list[tuple[str, int, int]]:
    """(relative path, size in bytes, time of modification in ns) of each file below a folder, also behind links."""
    found, seen = [], set()
    for here, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # links may lead in a circle
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        for path in (os.path.join(here, name) for name in sorted(names)):
            state = os.stat(path) if os.path.exists(path) else None
            found.append((os.path.relpath(path, folder), *((state.st_size, state.st_mtime_ns) if state else (-1, 0))))
    return found
