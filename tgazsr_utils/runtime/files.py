"""Files that are either whole or not there, and fingerprints of what a result depends on."""

import contextlib
import glob
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tgazsr_utils.core.seeds import digest


class DamagedFile(ValueError):
    """A file whose content is not what was written there."""


def write_atomic(path: Path, write: Callable[[Path], None]) -> Path:
    """Lets ``write`` fill a temporary file beside ``path``, hidden, and then puts it in place in one step.

    Raises OSError, which names ``path``, where that cannot be done; what was there before is then still there.
    """
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.stem)}-*{path.suffix}"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.lstat().st_mtime > 3600:
                    left.unlink()
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # what went wrong first is what is to be told
            temporary.unlink()
    return path


def write_json(path: Path, value: Any) -> Path:
    return write_atomic(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def save_tensors(path: Path, tensors: dict[str, Tensor], **about: Any) -> Path:
    """Writes safetensors with JSON-able values ``about`` them, each under its name, and a digest of all."""
    header = {name: json.dumps(value) for name, value in about.items()}
    header["digest"] = _digest_of_file(tensors, header)
    return write_atomic(path, lambda temporary: save_file(tensors, temporary, header))


def load_tensors(path: Path, **expected: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, values about them) of ``save_tensors``; what is ``expected`` of the latter is not among them.

    Raises DamagedFile if the file is not as it was written, or is about other things than expected; OSError if it
    cannot be read.
    """
    open(path, "rb").close()  # safetensors calls a file missing that it may not read
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        if header.pop("digest", None) != _digest_of_file(tensors, header):
            raise ValueError("its content is not what was written")
        about = {name: json.loads(value) for name, value in header.items()}
        for name, value in expected.items():
            if about.pop(name, None) != value:
                raise ValueError(f"it is not that of {value}")
    except (SafetensorError, ValueError) as error:
        raise DamagedFile(f"{path} is damaged ({' '.join(str(error).split())})") from None
    return tensors, about


def _digest_of_file(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    names = sorted(tensors)
    return digest(names, header, *(tensors[name] for name in names))
