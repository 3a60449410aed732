"""Names of what a number depends on, and random numbers that depend on such a name alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Any) -> str:
    """Twelve hex digits that name JSON-able values, tensors and file contents (given as Path)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, Path):
            sha.update(part.read_bytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:12]


def seeded(device: torch.device | str, *parts: Any) -> torch.Generator:
    """A random generator on a device, seeded by JSON-able values."""
    return torch.Generator(device).manual_seed(int(digest(*parts), 16))
