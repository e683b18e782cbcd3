"""Measure the quality of embeddings, without labels (pairs, std, RankMe) and with labels (kNN, linear)."""

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
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    votes = []
    for chunk in test.split(1024):
        similarity, nearest = (chunk @ train.T).topk(min(k, len(train)), dim=1)
        weights = (similarity / temperature).exp()
        vote = torch.zeros(len(chunk), classes, device=train.device)
        votes.append(vote.scatter_add_(1, train_labels[nearest], weights).argmax(dim=1))
    return torch.cat(votes)


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
