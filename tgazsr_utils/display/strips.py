"""What an attack does to single images: a strip an image, with each model's attention, answer and shift."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from tgazsr_utils.display.pictures import coloured, pixels
from tgazsr_utils.display.style import drawn, headed, looks
from tgazsr_utils.measuring.attention_shift import AttentionUnderAttack
from tgazsr_utils.runtime.weights import SHIPPED, training_in_words

_GAP = 0.16  # between one model's pictures and the next's, in pictures


@drawn
def attention_strips(
    attacked: Mapping[str, AttentionUnderAttack],
    rows: Sequence[int],
    class_names: Sequence[str],
    title: str,
    caption: str,
) -> Figure:
    """One strip an image of ``rows``: clean, attacked, each model's attention before, after, and after minus before.

    ``attacked``: name -> what an attack on this model did to the same images; the first one's attacked image is shown.
    Below: answers with their probabilities, and the shift (l2 distance of the maps on the patch grid).
    """
    widths = [1.0, 1.0, *(width for _ in attacked for width in (_GAP, 1.0, 1.0, 1.0))]
    size = 1.32 * sum(widths), 1.56 * len(rows) + 1.9
    figure, axes = plt.subplots(
        len(rows), len(widths), figsize=size, squeeze=False, width_ratios=widths, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0, hspace=0.02)
    for gap in axes[:, 2::4].flat:
        gap.set_visible(False)
    moved = {name: result.attacked_maps[[*rows]] - result.clean_maps[[*rows]] for name, result in attacked.items()}
    most = max(float(difference.abs().max()) for difference in moved.values()) or 1.0
    first, told = next(iter(attacked.values())), []
    for strip, row in zip(axes, rows):
        label = class_names[first.frame.label[row]]
        _show(strip[0], pixels(first.images[row]), f"a {label}")
        _show(strip[1], pixels(first.adversarial[row]), "looks the same")
        for number, (name, result) in enumerate(attacked.items()):
            told.append(f"{label}, {name}: {_maps_of(strip[3 + 4 * number :], name, result, row, most, class_names)}")
    _heads(axes[0], attacked)
    scales = {"attention": (0, 1, "viridis", axes[:, :4]), "after minus before": (-most, most, "RdBu_r", axes[:, 4:])}
    for label, (low, high, colours, where) in scales.items():
        scale = ScalarMappable(Normalize(low, high), colours)
        bar = figure.colorbar(scale, ax=where, orientation="horizontal", aspect=40, shrink=0.8, pad=0.01)
        bar.ax.tick_params(labelsize=9)
        bar.set_label(label, fontsize=10)
    return headed(figure, title, caption, "; ".join(told))


def tuned_in_words(name: str, weights: str | Path) -> str:
    """Which model "tuned" is, for captions: its name, whether it ships, and what its file says of its training.

    Such as "tuned: mini-tga-zsr (ships), TGA-ZSR, 2 epochs of 200 steps with 64 images each".
    """
    words = f"tuned: {Path(name).name}{' (ships)' if Path(weights) in SHIPPED.values() else ''}"
    return ", ".join(filter(None, [words, training_in_words(weights)]))


def _maps_of(
    strip: Sequence[Axes], name: str, result: AttentionUnderAttack, row: int, most: float, class_names: Sequence[str]
) -> str:
    """Draws one model's three pictures of an image, framed in its colour; says what is printed below them."""
    image, seen = result.images[row], result.frame.loc[row]
    before, after = result.clean_maps[row], result.attacked_maps[row]
    answers = [_answer(seen, side, class_names) for side in ("clean", "attacked")]
    shift = f"shift {seen.l2:.2f}"
    _show(strip[0], coloured(image, before, "viridis", 0.75), answers[0])
    _show(strip[1], coloured(result.adversarial[row], after, "viridis", 0.75), answers[1])
    _show(strip[2], coloured(image, (after - before) / (2 * most) + 0.5, "RdBu_r", 0.88), shift)
    for axis in strip[:3]:
        axis.spines[:].set(color=looks([name])[name].color, linewidth=1.5)
    strip[2].xaxis.label.set_fontweight("bold")
    return f"{answers[0]} becomes {answers[1]}, {shift}".replace("\n", " ")


def _heads(strip: Sequence[Axes], attacked: Mapping[str, AttentionUnderAttack]) -> None:
    heads = ["clean", "attacked"]
    for name in attacked:
        heads += ["", "before", f"{name} model's attention\nafter", "difference"]
    for axis, head in zip(strip, heads):
        axis.set_title(head, fontsize=11)


def _answer(seen: pd.Series, side: str, class_names: Sequence[str]) -> str:
    """The answer to the clean or to the attacked image, right or wrong, and its probability."""
    answer = int(seen[f"{side}_prediction"])
    words = textwrap.shorten(class_names[answer], 18, placeholder="…")
    return f"{'✓' if answer == seen.label else '✗'} {words} {100 * seen[f'{side}_probability']:.0f} %"


def _show(axis: Axes, picture: np.ndarray, below: str) -> None:
    axis.imshow(picture, interpolation="none")  # pixels as they are, in the vector file too
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(below, fontsize=10, labelpad=3)
