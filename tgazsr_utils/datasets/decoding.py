"""Image files as 8-bit RGB pixels: as a person sees them, or, for published sets, as published."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

# What Pillow opens only through another program, or knows by name only.
_NOT_HERE = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
_DEPTH, _GREATEST, _SIGNED = 258, 281, 2  # TIFF's BitsPerSample, MaxSampleValue, and a value of its SampleFormat


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case, of the image files that this Pillow reads."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _NOT_HERE)


def read_rgb(file: str | Path | BinaryIO) -> Image.Image:
    """The image in a file as a person sees it: turned as its orientation tag says, transparency on white.

    Greys of 9 to 16 bits are scaled by their range, those in floating point from [0,1]. Raises ValueError for greys
    without a range that is known, and whatever Pillow raises for what is no image.
    """
    with Image.open(file) as image:
        return _to_rgb(ImageOps.exif_transpose(image), getattr(image, "tag_v2", {}))


def read_as_published(file: str | Path) -> Image.Image:
    """As torchvision's data sets and the released codes read files: no orientation, no transparency."""
    with Image.open(file) as image:
        return image.convert("RGB")


def _to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """``tags``: of a TIFF."""
    if _SIGNED in np.ravel(tags.get(TiffImagePlugin.SAMPLEFORMAT, ())) and np.min(np.ravel(tags.get(_DEPTH))) <= 16:
        raise ValueError("its greys are signed, of what range is not known; save it with 8 or 16 bits")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        greys = _eight_bits(image, _bits(tags))
        white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # Pillow inverts the others itself
        return Image.fromarray(255 - greys if white_is_zero else greys).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _bits(tags: Mapping[int, Any]) -> int:
    """How many bits a TIFF's greys have, by the greatest value if it is stated; 16 of other files."""
    greatest = int(np.max(np.ravel(tags.get(_GREATEST, 0))))
    stated = greatest.bit_length()
    return stated if stated > 8 and greatest + 1 == 2**stated else int(np.ravel(tags.get(_DEPTH, 16))[0])


def _eight_bits(image: Image.Image, bits: int) -> np.ndarray:
    """Deep greys ``[H,W]`` as 8 bits."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode == "F" and low >= 0 and high <= 1:
        return (255 * values).round().astype(np.uint8)
    if image.mode.startswith("I;16"):
        return (values / ((2**bits - 1) / 255)).round().clip(max=255).astype(np.uint8)
    if image.mode == "I" and low >= 0 and 255 < high <= 65535:
        return (values / 257).round().astype(np.uint8)
    kind = "floating-point" if image.mode == "F" else "32-bit"
    raise ValueError(
        f"its {kind} greys run from {low:g} to {high:g}, of what range is not known; save it with 8 or 16 bits"
    )
