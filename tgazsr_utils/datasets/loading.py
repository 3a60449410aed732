"""Image sets: the mini-world's rendered tasks, the published sets, and class folders of your own photographs.

``python -m tgazsr_utils.datasets`` lists, checks and fetches the published sets.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.datasets import miniworld
from tgazsr_utils.datasets.class_folders import Source, Split
from tgazsr_utils.datasets.files import DecodedOnce, Files, OnBadImage, decoded, fit
from tgazsr_utils.datasets.layouts import class_names, existing_root, list_datasets, open_source
from tgazsr_utils.datasets.published_sets import DATASETS, DEFAULT_PROMPT, FURTHER, KNOWN, Preprocess

KEEP_DECODED = 2**28  # bytes: a set up to this size is kept in memory


def choose_datasets(
    wanted: list[str] | Literal["published"] | None, root: str | Path | None, test_fraction: float | None = None
) -> list[str]:
    """The test sets to use: those named; all there are (None); or those of the 16 published that are there.

    Unless named, a set without readable lists of test images is left out, and so is one of ``FURTHER``; lines say so.
    """
    if isinstance(wanted, list) or root is None and wanted is None:
        return wanted or list_datasets(root)
    there, listed = [], list_datasets(root) if root is not None else []
    if apart := [key for key in listed if key in FURTHER]:
        print(f"left out, as they are measured where they are named only: {', '.join(apart)}")
    for key in listed:
        if key in DATASETS or wanted is None and key not in apart:
            try:
                open_source(key, "test", existing_root(root), test_fraction)
                there.append(key)
            except ValueError as error:
                print(f"left out: {error}")
    missing = [key for key in DATASETS if key not in there]
    if not there:
        raise ValueError(f"data_root {str(root)!r} has no image set to use; see python -m tgazsr_utils.datasets list")
    if missing and wanted == "published":
        print(f"{len(there)} of {len(DATASETS)} published sets are there; missing: {', '.join(missing)}")
    return there


def load_dataset(
    key: str,
    split: Split,
    root: str | Path | None = None,
    n: int | None = None,
    image_size: int = miniworld.SIDE,
    seed: int = 0,
    *,
    preprocess: Preprocess | None = None,
    prompt: str | None = None,
    test_fraction: float | None = None,
    on_bad_image: OnBadImage = "stop",
    world: str | None = None,
    decode: bool = True,
    keep: Path | None = None,
) -> ImageSet:
    """The images of one set, at ``image_size`` x ``image_size``.

    ``root=None``: the mini-world, ``key`` a task, ``n`` images (default 1000) rendered anew for each ``seed``. Else
    ``key`` is one of ``KNOWN``, in its published layout below ``root``, or any folder ``<root>/<key>`` in
    Tiny-ImageNet's layout, with ``train`` and ``test`` (or ``val``) folders of ``<class>/*``, or with just
    ``<class>/*``, perhaps one level further down. A set without a split of its own is split for each class by ``seed``,
    ``test_fraction`` of it for testing; None: a fifth, but all of a published set. ``n`` caps the number of images,
    evenly over classes.
    ``preprocess`` and ``prompt`` replace the set's own: "resize" both sides, or "crop" (resize the shorter side to
    256/224 of ``image_size``, centre-crop); bilinear, by PIL. ``on_bad_image``: what an unreadable file does.
    ``world`` replaces what the numbers are said to be about. Sets of more than 256 MiB, and any with ``decode`` False,
    are read as they are needed; the former but once, if there is a folder ``keep`` to leave them decoded in.
    Raises ValueError for an unknown key, a missing folder, or an unreadable image unless that is to be left out.
    """
    if root is None:
        for name, value in (("preprocess", preprocess), ("test_fraction", test_fraction)):
            if value is not None:
                raise ValueError(f"{name} = {value!r} is for image files; the mini-world (data_root None) has none")
        return _load_miniworld(key, split, 1000 if n is None else n, image_size, seed, world, prompt)
    source, spec = open_source(key, split, existing_root(root), test_fraction, seed), KNOWN.get(key)
    own = spec.preprocess if spec else "crop"
    files = Files(source, torch.arange(len(source.labels)), image_size, preprocess or own, on_bad_image)
    data = _labelled(key, split, files, prompt, world or "photographs").subset(n, seed)
    if decode and (size := len(data) * 3 * image_size**2) <= KEEP_DECODED:
        return decoded(data)
    if keep is None or not decode:
        return data
    if not (once := DecodedOnce(data.images, keep)).path.exists():
        print(f"{key}: as they are first read, {len(data)} images are kept decoded in {keep} ({size / 1e9:.1f} GB)")
    return replace(data, images=once)


def class_texts(
    key: str, split: Split, root: str | Path | None, prompt: str | None = None, test_fraction: float | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the classes and what ``load_dataset`` will ask for, a prompt a class; no image is read.

    Raises ValueError as it does.
    """
    if root is None:
        prompts = _miniworld_prompts(key, prompt)
        return miniworld.TASKS[key].class_names, prompts
    return _named(key, open_source(key, split, existing_root(root), test_fraction), prompt)[:2]


def _named(key: str, source: Source, prompt: str | None) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Names and prompts of a set's classes, and the template of these."""
    spec = KNOWN.get(key)
    names, as_published = class_names(source, spec)
    template = prompt or (spec.prompt if spec else DEFAULT_PROMPT)
    asked = names if spec and template != spec.prompt else as_published
    return names, tuple(template.replace("{}", name) for name in asked), template


def _labelled(key: str, split: Split, files: Files, prompt: str | None, world: str) -> ImageSet:
    """All images of one part with their labels and prompts."""
    spec, source = KNOWN.get(key), files.source
    names, prompts, template = _named(key, source, prompt)
    told = [f"left out: {problem}" for problem in source.left_out]
    if same := sorted({prompt for prompt in prompts if prompts.count(prompt) > 1}):
        told.append(f"classes that cannot be told apart, as they have one prompt: {'; '.join(same)}")
    for problem in told:
        print(f"{key}: {problem}", file=sys.stderr, flush=True)
    found = len(source.labels), len(names), files.preprocess, template
    published = bool(spec) and split == "test" and found == (spec.images, spec.classes, spec.preprocess, spec.prompt)
    labels = torch.tensor(source.labels)
    return ImageSet(key, world, files, labels, names, prompts, mask_kind="box", published=published)


def _load_miniworld(
    key: str, split: Split, n: int, image_size: int, seed: int, world: str | None, prompt: str | None
) -> ImageSet:
    prompts, task = _miniworld_prompts(key, prompt), miniworld.TASKS[key]
    images, labels, masks = miniworld.task_images(key, n, split, seed)
    if image_size != miniworld.SIDE:
        images, masks = fit(images, image_size, "resize"), fit(masks, image_size, "resize", "nearest")
    texts = {"captions": miniworld.task_captions(key, n, split, seed), "descriptions": task.descriptions}
    return ImageSet(key, world or "mini-world", images, labels, task.class_names, prompts, masks, **texts)


def _miniworld_prompts(key: str, prompt: str | None) -> tuple[str, ...]:
    if key not in miniworld.TASKS:
        raise ValueError(f"mini-world task {key!r} is unknown; there are: {', '.join(miniworld.TASKS)}")
    task = miniworld.TASKS[key]
    return tuple((prompt or task.prompt).replace("{}", name) for name in task.class_names)
