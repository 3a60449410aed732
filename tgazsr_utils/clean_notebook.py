"""What git sees of a notebook: its cells, not what running, opening or saving it has added. A clean filter.

``install`` tells git of it; ``.gitattributes`` says for which files. The files themselves keep their outputs, and edits
are seen as ever. It imports nothing of the package, as git runs it by its path.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

_NAME = "filter.tgazsr-notebook.clean"
_CELL = ("execution", "ExecuteTime", "papermill", "collapsed", "scrolled", "trusted")  # metadata that running leaves
_BOOK = ("widgets", "papermill")


def cleaned(text: str) -> str:
    """As Jupyter writes a notebook that never ran; what is no notebook as it stands."""
    try:
        book = json.loads(text)
        for cell in book["cells"]:
            _clean(cell)
        about = book["metadata"]
        for name in _BOOK:
            about.pop(name, None)
        if "language_info" in about:
            about["language_info"] = {"name": about["language_info"]["name"]}
        if about.get("kernelspec", {}).get("name") == "python3":  # whatever this machine shows it as
            about["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return text
    return json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _clean(cell: dict) -> None:
    if cell["cell_type"] == "code":
        cell["outputs"], cell["execution_count"] = [], None
    for name in _CELL:
        cell["metadata"].pop(name, None)
    hidden = cell["metadata"].get("jupyter", {})
    if hidden.pop("outputs_hidden", None) is not None and not hidden:
        del cell["metadata"]["jupyter"]


def install(root: Path) -> None:
    """Names this filter in the repository at ``root``; where there is none, or no git, nothing is done."""
    if (root / ".git").exists() and (root / ".gitattributes").exists():
        command = f"{shlex.quote(Path(sys.executable).as_posix())} -I tgazsr_utils/clean_notebook.py"
        if _git(root, "config", "--local", "--get", _NAME) != command:
            _git(root, "config", "--local", _NAME, command)
        refresh(root)


def refresh(root: Path) -> None:
    """Lets git look again at notebooks of another size: it takes them for changed, whatever the filter makes of them.

    What differs to git, too, it is not told of.
    """
    for path in (_git(root, "ls-files", "--modified", "-z", "--", "notebooks/*.ipynb") or "").split("\0"):
        known = path and _git(root, "rev-parse", f":{path}")
        if known and _git(root, "hash-object", f"--path={path}", "--", path) == known:
            _git(root, "update-index", "--", path)


def after_save(model: dict, os_path: str, contents_manager: object) -> None:
    """What JupyterLab calls when it has saved a file of the workbook that this is a part of."""
    if model["type"] == "notebook":
        refresh(Path(__file__).resolve().parents[1])


def _git(root: Path, *arguments: str) -> str | None:
    """What git says; None where it cannot."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, timeout=60)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    as_utf8 = ("utf-8", "surrogateescape")  # bytes that are no UTF-8 come out as they went in
    sys.stdout.buffer.write(cleaned(sys.stdin.buffer.read().decode(*as_utf8)).encode(*as_utf8))
