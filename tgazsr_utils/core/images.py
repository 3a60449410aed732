"""Labelled images as the method sees them: batches of pixels in [0,1], labels, and the prompts of the classes."""

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

PLUMBING = "plumbing check, not a result"  # stands for the world wherever the original model has random weights


class Batch(NamedTuple):
    number: int  # of the chunk it was read from
    rows: Tensor  # [B] in the set, those that could be read
    images: Tensor  # [B,3,H,W] float in [0,1], on the device
    labels: Tensor  # [B] int64, on the device


class ImageReader(typing.Protocol):
    """Images that are read when they are asked for; ``datasets.loading`` has those for files."""

    def read(self, chunks: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For each chunk: the rows that could be read, their images ``[n,3,H,W]`` uint8, perhaps on ``device``."""

    def pick(self, rows: Tensor) -> "ImageReader":
        """The reader of these rows alone, in this order."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size, with the prompts of their classes."""

    key: str
    world: str  # "mini-world", "photographs" or PLUMBING: results of different worlds are never mixed
    images: Tensor | ImageReader  # [N,3,H,W] uint8, or what reads them
    labels: Tensor  # [N] int64
    class_names: tuple[str, ...]
    prompts: tuple[str, ...]  # one a class
    masks: Tensor | None = None  # [N,H,W] bool: where the object is
    mask_kind: str = "mask"  # "mask": its exact outline; "box": its bounding box
    available: int | None = None  # images in the whole part, if this is a cut of it
    published: bool = False  # as published: number of images and classes of the whole part, preprocessing, prompts
    left_out: int = 0  # images that are not among these since they cannot be read
    captions: tuple[str, ...] | None = None  # one an image
    descriptions: tuple[tuple[str, ...], ...] | None = None  # texts of each class, equally many

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, chunks: int | Sequence[Tensor], device: torch.device | str = "cpu", skip: int = 0
    ) -> Iterator[Batch]:
        """Batches of this size in order, or of these rows; without the first ``skip`` of them.

        An image that cannot be read is missing from its batch, or stops this with a ValueError that names it, as the
        reader was asked to do.
        """
        if isinstance(chunks, int):
            chunks = list(torch.arange(len(self)).split(chunks))
        device, left = torch.device(device), chunks[skip:]
        pieces = _rows_of(self.images, left) if isinstance(self.images, Tensor) else self.images.read(left, device)
        for number, (rows, images) in enumerate(pieces, start=skip):
            if len(rows):
                # also from memory that is not pinned: a blocking copy waits for all that the device has to do
                moved = images.to(device, non_blocking=True).float().div_(255)
                yield Batch(number, rows, moved, self.labels[rows].to(device, non_blocking=True))

    def captions_of(self, rows: Tensor) -> tuple[str, ...] | None:
        """Those of these images, if there are captions."""
        return None if self.captions is None else tuple(self.captions[row] for row in rows.tolist())

    def subset(self, n: int | None, seed: int = 0) -> "ImageSet":
        """At most ``n`` images, drawn by ``seed`` so that every class is there as often, within one, as it can be."""
        chosen = even_subset(self.labels, n, seed)
        return replace(
            self,
            images=self.images[chosen] if isinstance(self.images, Tensor) else self.images.pick(chosen),
            labels=self.labels[chosen],
            masks=None if self.masks is None else self.masks[chosen],
            captions=self.captions_of(chosen),
            available=self.available or len(self),
        )


def _rows_of(images: Tensor, chunks: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in chunks:
        yield rows, images[rows.to(images.device, non_blocking=True)]


def even_subset(labels: Tensor, n: int | None, seed: int) -> Tensor:
    """Sorted indices of at most ``n`` of ``labels`` ``[N]``, drawn so that classes are there as evenly as can be."""
    if n is None or n >= len(labels):
        return torch.arange(len(labels))
    rank = torch.empty(len(labels), dtype=torch.long)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank[members] = torch.arange(len(members))
    return shuffled[rank[shuffled].argsort(stable=True)][:n].sort().values


def ball(images: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """Tightest representable bounds of the eps-ball cut with [0,1]: rounding must not let a pixel out by an ulp."""
    low, high = (images.double() - eps).clamp(0, 1), (images.double() + eps).clamp(0, 1)
    inner_low, inner_high = low.to(images.dtype), high.to(images.dtype)
    inner_low = torch.where(inner_low.double() < low, torch.nextafter(inner_low, images), inner_low)
    inner_high = torch.where(inner_high.double() > high, torch.nextafter(inner_high, images), inner_high)
    return inner_low, inner_high
