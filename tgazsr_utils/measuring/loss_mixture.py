"""TGA-ZSR's loss on one batch for any Alpha and Beta, from one computation of its terms and their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

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
    """A row a term and one for their weighted sum; the norm of each weighted gradient, its cosine with the sum's."""
    weight = np.array([1.0, Alpha, Beta])
    norm_of_sum = np.sqrt(max(0.0, weight @ terms.products @ weight))
    columns = {"weight": weight, "value": terms.values, "weighted": weight * terms.values}
    table = pd.DataFrame(columns | {"gradient": weight * terms.norms}, TERMS)
    table["cosine"] = _ratio(terms.products @ weight, terms.norms * norm_of_sum)
    table.loc["sum"] = [np.nan, np.nan, table.weighted.sum(), norm_of_sum, 1.0 if norm_of_sum else np.nan]
    return table


def cosines(terms: TermGradients) -> dict[str, float]:
    """Of the gradients of each two terms, such as "CE, L_AR"; NaN where one is zero."""
    between = _ratio(terms.products, np.outer(terms.norms, terms.norms))
    return {f"{TERMS[i]}, {TERMS[j]}": float(between[i, j]) for i, j in combinations(range(len(TERMS)), 2)}


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where ``b`` is zero."""
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
