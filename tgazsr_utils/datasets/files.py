"""Images that are read from files as they are needed, and three ways to keep what was read."""

import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.libraries import torchvision
from tgazsr_utils.core.seeds import digest
from tgazsr_utils.datasets.class_folders import Box, Source
from tgazsr_utils.datasets.published_sets import Preprocess
from tgazsr_utils.machine import allowed_cpus
from tgazsr_utils.progress import progress

OnBadImage = Literal["stop", "leave_out"]
CPU = torch.device("cpu")
KEEP_RESIDENT = 2**31  # bytes: a set to tune on is kept up to this size, on CUDA up to an eighth of the device's memory
CHUNKS_AHEAD = 2  # decoded while another one is worked on
_CODE = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
FREE = 2**33  # bytes of a disk that are left to others


class Decoded(NamedTuple):
    image: Tensor  # [3,S,S] uint8
    mask: Tensor | None  # [S,S] bool


@dataclass(frozen=True, eq=False)
class Files:
    """Reads images from files, or from what else a layout keeps them in.

    By threads, since Pillow and numpy work without Python's lock: as fast as worker processes, which would need shared
    memory for their images and signals of their own.
    """

    source: Source
    chosen: Tensor  # [N] indices into the source
    side: int | None  # None: as the files are
    preprocess: Preprocess
    on_bad_image: OnBadImage = "stop"
    unreadable: list[str] = field(default_factory=list)  # what was left out so far, a line an image

    def read(self, chunks: Sequence[Tensor], device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``core.images.ImageReader``."""
        for rows, decoded in self.decode(chunks):
            images = [one.image for one in decoded] or [torch.empty(3, self.side or 0, self.side or 0).byte()]
            joined = torch.stack(images)[: len(rows)]
            yield rows, joined.pin_memory() if device.type == "cuda" else joined

    def pick(self, rows: Tensor) -> "Files":
        return replace(self, chosen=self.chosen[rows])

    def decode(self, chunks: Sequence[Tensor], masks: bool = False) -> Iterator[tuple[Tensor, list[Decoded]]]:
        """(rows that could be read, what was read) of each chunk; ``masks``: with those of its boxes, if it has any.

        At most ``1 + CHUNKS_AHEAD`` chunks are in memory; no thread outlives this, however it ends.
        Raises ValueError for an unreadable image, unless these are left out.
        """
        torchvision()  # here, as threads that import it at once get in each other's way
        pool = ThreadPoolExecutor(min(16, allowed_cpus()), thread_name_prefix="decode")
        ask = lambda chunk: [(row, pool.submit(self._decode, row, masks)) for row in chunk.tolist()]
        later = iter(chunks)
        try:
            waiting = deque(ask(chunk) for chunk in islice(later, 1 + CHUNKS_AHEAD))
            while waiting:
                yield self._collect(waiting.popleft())
                waiting.extend(ask(chunk) for chunk in islice(later, 1))
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, row: int, masks: bool) -> Decoded:
        i = int(self.chosen[row])
        image = self.source.open(i)
        fitted = fit(image, self.side, self.preprocess) if self.side else image
        pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1)))
        if not masks or not self.source.boxes:
            return Decoded(pixels, None)
        return Decoded(pixels, _box_mask(self.source.boxes[i], image.size, self.side, self.preprocess))

    def _collect(self, asked: list[tuple[int, Future]]) -> tuple[Tensor, list[Decoded]]:
        rows, decoded = [], []
        for row, future in asked:
            try:
                decoded.append(future.result())
                rows.append(row)
            except Exception as error:  # PIL raises many kinds for a damaged file, h5py and pickle others
                self._cannot_be_read(row, " ".join(str(error).split()) or type(error).__name__)
        return torch.tensor(rows, dtype=torch.long), decoded

    def _cannot_be_read(self, row: int, reason: str) -> None:
        problem = f"image {' '.join(self.source.where[int(self.chosen[row])].split())} cannot be read: {reason}"
        if self.on_bad_image == "stop":
            raise ValueError(f"{problem} (on_bad_image leave_out goes on without it)") from None
        if problem not in self.unreadable:
            self.unreadable.append(problem)
            print(f"left out: {problem}", file=sys.stderr, flush=True)

    def identity(self) -> list[Any]:
        """What tells these images from others without reading them: files by name and size, and how they are read."""
        contents = [self.source.contents[i] for i in self.chosen.tolist()]
        return [contents, [self.side, self.preprocess, self.on_bad_image]]

    def modified(self) -> list[int]:
        """When their files were written, in ns."""
        return [self.source.modified[i] for i in self.chosen.tolist()] if self.source.modified else []


@dataclass(frozen=True, eq=False)
class KeptAtFileSize:
    """Images in memory at the size of their files, fitted in each batch: as by PIL, within one grey level."""

    images: Tensor  # [N,3,h,w] uint8
    files: Files

    def read(self, chunks: Sequence[Tensor], device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``core.images.ImageReader``."""
        for rows in chunks:
            yield rows, fit(self.images[rows.to(self.images.device)], self.files.side, self.files.preprocess)

    def pick(self, rows: Tensor) -> "KeptAtFileSize":
        return KeptAtFileSize(self.images[rows.to(self.images.device)], self.files.pick(rows))

    def identity(self) -> list[Any]:
        return self.files.identity()

    def modified(self) -> list[int]:
        return self.files.modified()


@dataclass(frozen=True, eq=False)
class DecodedOnce:
    """Images kept decoded as they are first read, in a file mapped into memory by all that read them later.

    The file ends with a byte an image: 1 for one that is there. It can be deleted at any time. Where it cannot be made,
    as there is no room, images are read as ``files`` reads them.
    """

    files: Files
    folder: Path

    def read(self, chunks: Sequence[Tensor], device: torch.device = CPU) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``core.images.ImageReader``."""
        try:
            images, there = self._mapped()
        except OSError as error:  # not to be written, a quota
            self._cannot_keep(error)
            yield from self.files.read(chunks, device)
            return
        lacking, keep = [not there[rows].all() for rows in chunks], True
        decoding = self.files.read([rows for rows, lacks in zip(chunks, lacking) if lacks], device)
        for rows, lacks in zip(chunks, lacking):
            if not lacks:
                read = images[rows]
                yield rows, read.pin_memory() if device.type == "cuda" else read
                continue
            rows, read = next(decoding)
            keep = keep and self._keep(rows, read)
            yield rows, read

    def pick(self, rows: Tensor) -> Files:
        return self.files.pick(rows)

    def identity(self) -> list[Any]:
        return self.files.identity()

    def modified(self) -> list[int]:
        return self.files.modified()

    @cached_property
    def path(self) -> Path:
        """Named by all that the pixels depend on: files, with their times, the code of this room, Pillow."""
        return self.folder / f"{digest(*self.identity(), self.modified(), _CODE, PIL.__version__)}.uint8"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.files.chosen), 3, self.files.side, self.files.side))

    def _mapped(self) -> tuple[Tensor, Tensor]:
        """Images ``[N,3,S,S]``, and which are there ``[N]``. Raises OSError where they cannot be kept."""
        pixels, size = self.shape.numel(), self.shape.numel() + self.shape[0]
        if not self.path.exists() or self.path.stat().st_size != size:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(self.folder).free) < size + FREE:
                raise OSError(f"they take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            with open(self.path, "ab") as file:
                file.truncate(size)  # takes no room yet
        kept = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        return kept[:pixels].view(self.shape), kept[pixels:]

    def _keep(self, rows: Tensor, images: Tensor) -> bool:
        """Writes images, and only when they are on the disk that they are there. False where it cannot."""
        try:
            with open(self.path, "r+b") as file:
                for row, image in zip(rows.tolist(), images.numpy()):
                    file.seek(row * image.size)
                    file.write(image)
                file.flush()
                os.fsync(file.fileno())
                for row in rows.tolist():
                    file.seek(self.shape.numel() + row)
                    file.write(b"\1")
            return True
        except OSError as error:  # a disk that others have filled; a file that has been deleted
            self._cannot_keep(error)
            return False

    def _cannot_keep(self, error: OSError) -> None:
        print(f"decoded images cannot be kept in {self.folder}: {error.strerror or error}", file=sys.stderr, flush=True)


def resident(data: ImageSet, device: torch.device) -> ImageSet:
    """The same set with its images in the memory of ``device``, if they fit there (``KEEP_RESIDENT``); else as it is.

    Images that are read as needed are kept at the size of their files, where all have one smaller than what is asked.
    """
    limit = torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else KEEP_RESIDENT
    if isinstance(data.images, Tensor):
        return replace(data, images=data.images.to(device)) if data.images.numel() <= limit else data
    whole = replace(data.images, side=None)
    shape = next(whole.read([torch.arange(len(data))[:1]]))[1].shape[1:]
    if not 0 < shape[1:].numel() < data.images.side**2 or len(data) * shape.numel() > limit:
        return data
    images, kept = torch.empty(len(data), *shape, dtype=torch.uint8), 0
    for rows, read in _decode_in_order(data.key, whole):
        if any(one.image.shape != shape for one in read):
            return data
        for row, one in zip(rows, read):
            images[row] = one.image
        kept += len(rows)
    return data if kept < len(data) else replace(data, images=KeptAtFileSize(images.to(device), data.images))


def decoded(data: ImageSet) -> ImageSet:
    """The same set with all images in memory that can be read. Raises ValueError if there is none."""
    if isinstance(data.images, Tensor):
        return data
    rows, images, masks = [], [], []
    for part, read in _decode_in_order(data.key, data.images, masks=True):
        rows.append(part)
        images += [one.image for one in read]
        masks += [one.mask for one in read if one.mask is not None]
    if not images:
        raise ValueError(f"image set {data.key!r}: none of its {len(data)} images can be read")
    kept = torch.cat(rows)
    boxes = torch.stack(masks) if masks else None
    lacking = len(data) - len(kept)
    of_these = {"labels": data.labels[kept], "masks": boxes, "captions": data.captions_of(kept)}
    return replace(data, images=torch.stack(images), left_out=lacking, **of_these)


def _decode_in_order(name: str, files: Files, masks: bool = False) -> Iterator[tuple[Tensor, list[Decoded]]]:
    """All images in order, with a bar."""
    n = len(files.chosen)
    with progress(total=n, desc=f"read {name}", leave=False, unit="image") as bar:
        for rows, read in files.decode(torch.arange(n).split(64), masks):
            yield rows, read
            bar.update(len(rows))


def _box_mask(box: Box, size: tuple[int, int], side: int, preprocess: Preprocess) -> Tensor:
    mask = Image.new("L", size)
    mask.paste(255, (box[0], box[1], box[2] + 1, box[3] + 1))
    return torch.from_numpy(np.array(fit(mask, side, preprocess, "nearest"))) > 127


Pixels = TypeVar("Pixels", Image.Image, Tensor)


def fit(image: Pixels, side: int, preprocess: Preprocess, mode: Literal["bilinear", "nearest"] = "bilinear") -> Pixels:
    """An image, or images ``[...,H,W]``, at ``side`` x ``side``: "resize" both sides, or "crop" the centre.

    Before that crop the shorter side is brought to 256/224 of ``side``.
    """
    transforms = torchvision().transforms
    interpolation = transforms.InterpolationMode(mode)
    if preprocess == "resize":
        return transforms.functional.resize(image, [side, side], interpolation)
    height, width = transforms.functional.get_dimensions(image)[1:]
    most = 64 * min(height, width)  # all that is cropped away of a thinner one would take gigabytes
    if max(height, width) > most:
        middle = [length if length <= most else most + length % 2 for length in (height, width)]
        image = transforms.functional.center_crop(image, middle)
    resized = transforms.functional.resize(image, round(side * 256 / 224), interpolation)
    return transforms.functional.center_crop(resized, [side, side])
