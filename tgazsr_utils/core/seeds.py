"""Names of what a number depends on, and random numbers that depend on such a name alone."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

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


class Noise(NamedTuple):
    """Random numbers of each image, by a seed, its row and a place in it alone: the same in any batch, any device."""

    seed: int
    rows: Tensor  # [B] int64

    @classmethod
    def named(cls, rows: Tensor, *parts: Any) -> "Noise":
        """Seeded by JSON-able values."""
        return cls(int(digest(*parts), 16), rows)

    def uniform(self, *shape: int) -> Tensor:
        """``[B,*shape]`` in [0,1), multiples of 2^-24: SplitMix64 (Steele et al. 2014), a hashed counter for each."""
        places = torch.arange(1, 1 + math.prod(shape), device=self.rows.device)
        bits = _mixed(_mixed(self.rows + self.seed)[:, None] + places * _signed(0x9E3779B97F4A7C15))
        return (_shifted(bits, 40).float() / 2**24).view(len(self.rows), *shape)


def _mixed(x: Tensor) -> Tensor:
    """A hash of int64, whose products are modulo 2^64."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros for the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64
