"""Independent, slow, float64 NumPy versions of the method's formulas, written from the paper's definitions."""

import numpy as np
from scipy.special import digamma, loggamma


def attention(pooled, patches, text, variant):
    """[P, D] patches, [D] pooled, [D] text -> [P] map in [0,1]."""
    count, width = patches.shape
    tokens = np.concatenate([pooled[None], patches]).astype(np.float64)
    scores = np.zeros(count)
    for p in range(count):
        for d in range(width):
            norm = np.sqrt((tokens[:, d] ** 2).sum()) if variant == "reference" else np.sqrt((tokens[1 + p] ** 2).sum())
            scores[p] += tokens[1 + p, d] / norm * text[d]
    return (scores - scores.min()) / (scores.max() - scores.min())


def bilinear(grid, size):
    """[h, w] -> [size, size], pixel centres aligned (align_corners=False), edges clamped."""
    height, width = grid.shape
    out = np.zeros((size, size))
    for i in range(size):
        y = min(max((i + 0.5) * height / size - 0.5, 0), height - 1)
        y0 = int(y)
        y1 = min(y0 + 1, height - 1)
        for j in range(size):
            x = min(max((j + 0.5) * width / size - 0.5, 0), width - 1)
            x0 = int(x)
            x1 = min(x0 + 1, width - 1)
            top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
            bottom = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def distance(a, b, metric, size):
    a, b = bilinear(a, size).ravel(), bilinear(b, size).ravel()
    if metric == "l2":
        return np.sqrt(((a - b) ** 2).sum())
    if metric == "l1":
        return np.abs(a - b).mean()
    return 1 - a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b))


def log_softmax(pooled, text, scale):
    """[B, D], [C, D] -> [B, C]"""
    rows = []
    for row in pooled.astype(np.float64):
        logits = np.array([scale * (row @ t) / np.sqrt(row @ row) for t in text])
        rows.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return np.array(rows)


def divergence(p, q):
    """KL(p || q) summed over the batch, from log probabilities."""
    return sum(np.exp(a) * (a - b) for a, b in zip(p.ravel(), q.ravel()))


def contrastive(pooled, text, scale):
    """Image i belongs to text i; cross-entropy over texts and over images, halved."""
    unit = pooled.astype(np.float64) / np.sqrt((pooled.astype(np.float64) ** 2).sum(1, keepdims=True))
    total = 0.0
    for logits in (scale * unit @ text.T, scale * text @ unit.T):
        for i, row in enumerate(logits):
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[i]
    return total / 2 / len(pooled)


def cross_entropy(pooled, text, labels, scale):
    total = 0.0
    for row, label in zip(pooled.astype(np.float64), labels):
        logits = np.array([scale * (row @ t) / np.sqrt(row @ row) for t in text])
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    return total / len(labels)


def dirichlet_divergence(a, b):
    """KL(Dir(a) || Dir(b)) of two vectors."""
    total = loggamma(sum(a)) - loggamma(sum(b))
    for p, q in zip(a, b):
        total += loggamma(q) - loggamma(p) + (p - q) * (digamma(p) - digamma(sum(a)))
    return total
