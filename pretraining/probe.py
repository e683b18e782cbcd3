"""Measure the quality of embeddings, without labels (pairs, std, RankMe) and with labels (kNN, linear)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def pair_accuracy(z1: Tensor, z2: Tensor, cells: int = 1 << 24) -> Tensor:
    """Share of the 2N embeddings of which the most similar other one is the second view of its window.

    z1, z2 [N, D] -> []. Similarity is the cosine; so many `cells` of its [2N, 2N] matrix exist at one time.
    """
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    anchors = torch.arange(len(z), device=z.device)
    right = torch.zeros((), device=z.device)
    for rows in anchors.split(max(1, cells // len(z))):
        similarity = z[rows] @ z.T
        similarity.scatter_(1, rows[:, None], float("-inf"))  # not to itself
        right += (similarity.argmax(dim=1) == (rows + len(z1)) % len(z)).sum()
    return right / len(z)


@torch.no_grad()
def embedding_std(z: Tensor) -> Tensor:
    """Mean over the dimensions of the std of the normalised embeddings, times sqrt(D): z [N, D] -> [].

    It is 1 if embeddings are spread over the sphere and 0 if they have collapsed to a point (Chen and He,
    arXiv 2011.10566, section 4.1).
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def rank_me(z: Tensor, eps: float = 1e-7, rows: int = 1024) -> Tensor:
    """Effective rank of embeddings, exp of the entropy of the normalised singular values: z [N, D] -> [].

    It lies between 1 and min(N, D) (Garrido et al., RankMe, arXiv 2210.02885, equations 1 and 2), and is NaN
    where z is not finite. The first `rows` embeddings are used. Their singular values are the roots of the
    eigenvalues of the smaller Gram matrix, in float64, where squaring costs no digit that counts.
    """
    z = z[:rows].double()
    if not z.isfinite().all():
        return z.new_tensor(torch.nan)
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(eps) + eps
    return torch.exp(-(p * p.log()).sum())


@torch.no_grad()
def knn_predict(
    train: Tensor, train_labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Predict classes by a weighted vote of the k nearest neighbours in cosine similarity.

    The weights are exp(similarity / temperature) (Wu et al., arXiv 1805.01978, section 3.4). Later work uses
    k = 20.

    Args:
        train: features [N, D]; train_labels: int64 [N] in 0..classes - 1; test: features [M, D].

    Returns:
        int64 [M].
    """
    return knn_votes(train, train_labels, test, classes, k, temperature).argmax(dim=1)


@torch.no_grad()
def knn_votes(
    train: Tensor, train_labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The votes of `knn_predict` for each class, float [M, classes]; -inf for a class that has none."""
    similarity, nearest = neighbours(train, test, k)
    weights = (similarity / temperature).exp()
    votes = torch.zeros(len(test), classes, device=train.device)
    votes.scatter_add_(1, train_labels[nearest], weights)
    return votes.masked_fill(votes == 0, float("-inf"))


@torch.no_grad()
def neighbours(train: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity, and place among the features train [N, D], of the nearest k to each of test [M, D].

    Both [M, min(k, N)], the nearest first.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    found = [(chunk @ train.T).topk(min(k, len(train)), dim=1) for chunk in test.split(1024)]
    return torch.cat([near.values for near in found]), torch.cat([near.indices for near in found])


def fit_linear(
    train: Tensor, labels: Tensor, classes: int, weight_decay: float, iterations: int = 200
) -> nn.Linear:
    """Multinomial logistic regression by full-batch L-BFGS: frozen features [N, D] -> nn.Linear(D, classes).

    The features should be standardised. `weight_decay` multiplies the squared norm of the weights without the
    bias.
    """
    linear = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(train), labels) + weight_decay * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


@dataclass(frozen=True)
class LinearProbe:
    """What a linear layer on frozen features says of M test crops, and its weight decay."""

    scores: Tensor  # float [M, classes]
    weight_decay: float


def linear_probe(
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor] | Sequence[str],
    test: Tensor,
    classes: int,
    weight_decays: Sequence[float],
) -> LinearProbe:
    """Fit `fit_linear` to standardised features, by the weight decay with the best accuracy.

    train: features [N, D] and labels int64 [N]. valid: the same of the crops that choose the weight decay; or
    the sheet of each crop of train, for cross-validation over sheets in at most five parts. test: features
    [M, D]. Of weight decays that are equally good the first is taken.
    """
    x, y = train
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-6)
    x = (x - mean) / std
    if isinstance(valid, tuple):
        trials = [(torch.ones_like(y, dtype=torch.bool), (valid[0] - mean) / std, valid[1])]
    else:
        held = [torch.from_numpy(part).to(y.device) for part in sheet_parts(valid)]
        trials = [(~part, x[part], y[part]) for part in held]
    right = dict.fromkeys(weight_decays, 0)
    fitted = {}
    for decay in right if len(right) > 1 else ():
        for kept, features, labels in trials:
            fitted[decay] = fit_linear(x[kept], y[kept], classes, decay)
            right[decay] += int((fitted[decay](features).argmax(dim=1) == labels).sum())
    best = max(right, key=lambda decay: right[decay])
    whole = fitted[best] if best in fitted and isinstance(valid, tuple) else fit_linear(x, y, classes, best)
    with torch.no_grad():
        return LinearProbe(whole((test - mean) / std), best)


def sheet_parts(sheets: Sequence[str], parts: int = 5) -> list[np.ndarray]:
    """bool [N] for each of at most so many parts: whether a crop is in it. A sheet is in one part alone.

    sheets: of N crops. The sheet with most crops goes first, each to the smallest part so far. The crops of
    a single sheet are taken one by one, and a single crop has no parts.
    """
    names = list(sheets) if len(set(sheets)) > 1 else [str(n) for n in range(len(sheets))]
    sizes = [0] * min(parts, len(set(names)))
    home = {}
    for name, crops in Counter(names).most_common():
        home[name] = sizes.index(min(sizes))
        sizes[home[name]] += crops
    part = np.array([home[name] for name in names])
    return [part == n for n in range(len(sizes))] if len(sizes) > 1 else []


def accuracy(predicted: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of correct predictions, both int64 [N], and its mean over the classes that occur; in 0..1."""
    right = (predicted == labels).float()
    per_class = [right[labels == k].mean() for k in labels.unique()]
    return right.mean().item(), torch.stack(per_class).mean().item()


def unseen(train_labels: Tensor, test_labels: Tensor, classes: list[str]) -> str:
    """A sentence that names the classes of test that train has no example of; "" if there is none.

    No classifier can be right on them, which lowers its accuracy whatever the features.
    """
    names = [classes[k] for k in test_labels.unique().tolist() if not (train_labels == k).any()]
    crops = sum(int((test_labels == classes.index(name)).sum()) for name in names)
    return f"{crops} test crops are of classes that train lacks: {', '.join(names)}" if names else ""
