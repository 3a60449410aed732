"""TGA-ZSR's loss on one batch for any Alpha and Beta, from one computation of its terms and their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tgazsr_utils.core.models import Clip
from tgazsr_utils.core.objectives import Step, find_objective
from tgazsr_utils.core.settings import FinetuneSettings
from tgazsr_utils.core.training import attacked, trainable

TGA = find_objective("TGA-ZSR")
TERMS = ("CE", "L_AR", "L_AMC")


@dataclass(frozen=True)
class TermGradients:
    """The loss terms on one batch, and the inner products of their gradients by the image encoder's weights."""

    values: tuple[float, ...]  # of TERMS, unweighted
    products: np.ndarray  # [3,3]

    @property
    def norms(self) -> np.ndarray:
        """Of the gradients ``[3]``."""
        return np.sqrt(self.products.diagonal())


def term_gradients(
    clip: Clip, original: Clip, images: Tensor, labels: Tensor, prompts: Sequence[str], settings: FinetuneSettings
) -> TermGradients:
    """Of a batch ``images`` ``[B,3,H,W]`` in [0,1], ``labels`` ``[B]``, attacked against ``clip`` as in training."""
    tuned = clip.frozen_copy()
    weights = trainable(tuned.visual, settings.last_num_ft)
    batch = Step(tuned, original, images, labels, tuple(prompts))
    batch.adversarial = attacked(batch, TGA, settings, 0)
    terms = TGA.terms(batch, settings)
    gradients = []
    for term in terms:
        parts = torch.autograd.grad(term.value, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    matrix = torch.stack(gradients).double()
    return TermGradients(tuple(term.value.item() for term in terms), (matrix @ matrix.T).cpu().numpy())


def mixture(terms: TermGradients, Alpha: float, Beta: float) -> pd.DataFrame:
    """A row a term and one for their weighted sum: values, the norm of each weighted gradient, its cosine with the
    sum's, and its part along the sum. Values and parts add up to those of the sum; norms do not.
    """
    weight = np.array([1.0, Alpha, Beta])
    norm_of_sum = np.sqrt(max(0.0, weight @ terms.products @ weight))
    columns = {"weight": weight, "value": terms.values, "weighted": weight * terms.values}
    table = pd.DataFrame(columns | {"gradient": weight * terms.norms}, TERMS)
    table["cosine"] = _ratio(terms.products @ weight, terms.norms * norm_of_sum)
    table["along"] = table.gradient * table.cosine.fillna(0)
    ends = [norm_of_sum, 1.0 if norm_of_sum else np.nan, norm_of_sum]
    table.loc["sum"] = [np.nan, np.nan, table.weighted.sum(), *ends]
    return table


def cosines(terms: TermGradients) -> pd.DataFrame:
    """Between the gradients of each two terms ``[3,3]``; NaN where one is zero."""
    return pd.DataFrame(_ratio(terms.products, np.outer(terms.norms, terms.norms)), TERMS, TERMS)


def in_words(table: pd.DataFrame, between: pd.DataFrame) -> str:
    """What a ``mixture`` makes of the loss, and how the attention term that pulls harder does so beside CE."""
    if not table.gradient[["L_AR", "L_AMC"]].any():
        return "Neither attention term pulls at the weights here: this is the loss of TeCoA, CE alone."
    shares = ", ".join(f"{name} {100 * table.weighted[name] / table.weighted['sum']:.0f} %" for name in TERMS)
    hard = table.gradient[["L_AR", "L_AMC"]].idxmax()
    cosine = between.loc["CE", hard]
    ways = (-0.1, "points away from it"), (0.1, "is at right angles to it"), (0.5, "leans its way")
    way = next((words for limit, words in ways if cosine < limit), "points the same way")
    times = table.gradient[hard] / table.gradient["CE"]
    pulls = f"The gradient of {hard} is {times:.1f} times that of CE and {way} (cosine {cosine:+.2f})"
    return f"Of the loss: {shares}. {pulls}."


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where ``b`` is zero."""
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
