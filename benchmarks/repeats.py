"""How soon do the iterates of PGD repeat, to the bit? ``python benchmarks/repeats.py``, minutes on a CPU.

A sign step moves all pixels by one length, so iterates lie on a grid, and with steps as long as epsilon, as published,
on few of its points: once one comes back, the rest of the hundred steps goes round in a circle. Of the mini-CLIP before
and after tuning, and of ViT-B/32 with random weights, whatever may be said of those: the share of images whose iterate
has come back within STEPS steps, when (median, nine in ten, last), how many circles have two iterates, and how many
steps ``pgd`` takes of a whole batch. Writes ``repeats.json`` into --output.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgazsr_utils.core import attacks
from tgazsr_utils.core.images import ImageSet
from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.seeds import Noise, digest
from tgazsr_utils.datasets.loading import load_dataset
from tgazsr_utils.runtime.files import write_json
from tgazsr_utils.runtime.weights import load_clip

STEPS = 100
MODELS = {"mini-CLIP": ("mini-clip", "mini"), "mini-CLIP, TGA-ZSR": ("mini-clip", "mini-tga-zsr")}
MODELS |= {"ViT-B/32, random weights": ("ViT-B-32", None)}


@contextlib.contextmanager
def noted(iterates: list[Tensor]) -> Iterator[None]:
    """Within, ``pgd`` leaves what each of its steps makes."""
    step = attacks._step

    def noting(*arguments: Any) -> tuple[Tensor, Tensor]:
        moved, right = step(*arguments)
        iterates.append(moved.cpu())
        return moved, right

    attacks._step = noting
    try:
        yield
    finally:
        attacks._step = step


def repeats(clip: Clip, data: ImageSet, eps: float, step: float, steps: int = STEPS) -> dict[str, Any]:
    """Of all images of a set at once; ``eps`` and ``step`` in 1/255."""
    (batch,) = data.batches(len(data), clip.device)
    text, rows, taken = clip.encode_text(data.prompts), batch.rows.to(clip.device), []
    attack = lambda: attacks.pgd(
        clip, batch.images, batch.labels, text, eps / 255, step / 255, steps, generator=Noise.named(rows, "repeats")
    )
    with noted(taken):
        attack()
    whole, usual = [], attacks.ROUND
    attacks.ROUND = steps + 1
    try:
        with noted(whole):
            attack()
    finally:
        attacks.ROUND = usual
    found = [first_that_came_back([digest(image) for image in images]) for images in zip(*whole)]
    back, periods = np.array([at for at, _ in found]), np.array([period for _, period in found])
    known = back[back > 0]
    quantiles = np.quantile(known, [0.5, 0.9, 1]).tolist() if len(known) else 3 * [None]
    when = dict(zip(("median_step", "nine_in_ten_by", "last_at"), quantiles))
    return {
        "images": len(back),
        "share_that_repeat": float((back > 0).mean()),
        **when,
        "share_of_two": float((periods == 2).mean()),
        "steps_of_the_whole_batch": len(taken),
    }


def first_that_came_back(names: list[str]) -> tuple[int, int]:
    """Step at which an iterate is one of before, and how many steps before; zeros where all differ."""
    seen: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if name in seen:
            return number, number - seen[name]
        seen[name] = number
    return 0, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--images", type=int, default=64, help="of each set; an eighth of it for ViT-B/32")
    parser.add_argument("--sets", nargs="+", default=["shapes", "letters", "counts"])
    options = parser.parse_args()
    rows = []
    for name, (arch, weights) in MODELS.items():
        clip = load_clip(arch, weights, "cpu")
        n, sets = (options.images, options.sets) if weights else (max(1, options.images // 8), options.sets[:1])
        for key in sets:
            data = load_dataset(key, "test", n=n, image_size=clip.image_size[0])
            for eps, part in ((1.0, 1), (1.0, 4), (3.5, 1)):
                about = {"model": name, "set": key, "eps_255": eps, "step_255": eps / part}
                rows.append(about | repeats(clip, data, eps, eps / part))
                print(rows[-1], flush=True)
    about = {"torch": torch.__version__, "steps": STEPS, "rows": rows}
    print(write_json(options.output / "repeats.json", about))


if __name__ == "__main__":
    main()
