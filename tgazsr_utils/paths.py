"""Where the workbook lies, and what relative paths are relative to."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


def resolve(path: str | Path) -> Path:
    """A path as given if absolute, else under the workbook's folder, whatever the working directory is.

    Raises ValueError for text that can be no path: too long, with a NUL, not UTF-8, or below the home folder ("~") of
    somebody who has none.
    """
    try:
        found = (ROOT / Path(path).expanduser()).resolve()
        longest = max(len(part.encode()) for part in found.parts)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"path {str(path)[:120]!r}: {error}") from None
    if longest > 255 or len(str(found).encode()) > 4000:
        raise ValueError(f"path {str(path)[:120]!r}... is too long for one: {len(str(path))} characters")
    return found
