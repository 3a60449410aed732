"""Files that are either whole or not there, and fingerprints of what a result depends on."""

import contextlib
import glob
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = Path(__file__).parent
# Read when the package is imported: what names a result is the code that ran, not what an editor has made of it since.
_SOURCES = {path.stem: path.read_text() for path in sorted(PACKAGE.glob("*.py"))}


class DamagedFile(ValueError):
    """A file whose content is not what was written there."""


def write_atomic(path: Path, write: Callable[[Path], None]) -> Path:
    """Lets ``write`` fill a temporary file beside ``path``, hidden, and then puts it in place in one step.

    Raises OSError, which names ``path``, where that cannot be done; what was there before is then still there.
    """
    try:
        return _write_atomic(path, write)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise OSError(f"{path} cannot be written: {reason}") from error


def _write_atomic(path: Path, write: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.stem)}-*{path.suffix}"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
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

    Raises DamagedFile if the file is not as it was written, or is about other things than expected; OSError if it cannot be read.
    """
    open(path, "rb").close()  # safetensors calls a file missing that it may not read
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
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


def digest(*parts: Any) -> str:
    """Twelve hex digits that name JSON-able values, tensors and file contents (given as Path)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, Path):
            sha.update(part.read_bytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:12]


def sha256_of(path: Path) -> str:
    """Of a file of any size, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            sha.update(part)
    return sha.hexdigest()


def seeded(device: torch.device | str, *parts: Any) -> torch.Generator:
    """A random generator on a device, seeded by JSON-able values."""
    return torch.Generator(device).manual_seed(int(digest(*parts), 16))


def code_version(modules: Iterable[str] = ()) -> str:
    """Names the source of some of the package's modules (default: all); changes whenever they do."""
    return digest(*(_SOURCES[name] for name in modules or _SOURCES))
