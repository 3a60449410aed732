"""Where the workbook lies, and what relative paths are relative to."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"


def resolve(path: str | Path) -> Path:
    """A path as given if absolute, else under the workbook's folder, whatever the working directory is.

    Raises ValueError for one below the home folder ("~") of somebody who has none.
    """
    try:
        return (ROOT / Path(path).expanduser()).resolve()
    except RuntimeError as error:
        raise ValueError(f"path {str(path)!r}: {error}") from None
