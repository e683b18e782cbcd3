"""The figures that judge an embedding, at values known in advance."""

import cv2
import numpy as np
import pytest
import torch

from pretraining.features import ClassFolder, class_names
from pretraining.probe import embedding_std, fit_linear, knn_predict, pair_accuracy, rank_me, unseen
from schematics.sheets import DataError


@pytest.mark.parametrize("cells", [1, 50, 1 << 24])  # a row at a time, three, and all
def test_pair_accuracy_is_one_for_perfect_pairs_and_chance_for_a_point(cells):
    assert pair_accuracy(torch.eye(8) * 3, torch.eye(8), cells) == 1
    mixed = torch.eye(8)[[0, 1, 2, 3, 5, 4, 7, 6]]  # of the last four windows, the views of two are swapped
    assert pair_accuracy(torch.eye(8), mixed, cells) == 0.5
    assert pair_accuracy(torch.ones(8, 4), torch.ones(8, 4), cells) < 0.2


def test_std_is_one_on_the_sphere_and_zero_at_a_point():
    assert embedding_std(torch.randn(4096, 64)).item() == pytest.approx(1, abs=0.02)
    assert embedding_std(torch.ones(16, 8)).item() == 0


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rank_me_counts_the_directions_used(rank):
    z = torch.zeros(32, 16)
    z[:, :rank] = torch.linalg.qr(torch.randn(32, rank))[0]
    assert rank_me(z).item() == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("shape", [(24, 200), (200, 24)])
def test_rank_me_is_that_of_the_singular_values(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(0, -6, shape[1])
    )
    p = torch.linalg.svdvals(z.double())
    p = p / p.sum() + 1e-7
    assert rank_me(z).item() == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=5e-6)
    assert rank_me(torch.cat([z, z + 1]), rows=len(z)) == rank_me(z)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rank_me_is_nan_where_an_embedding_is_not_finite(bad):
    z = torch.ones(8, 4)
    z[3, 2] = bad
    assert rank_me(z).isnan()


def test_knn_and_linear_separate_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 32, generator=generator) * 3
    labels = torch.arange(200) % 5
    features = centres[labels] + torch.randn(200, 32, generator=generator)
    train, test = (features[:150], labels[:150]), (features[150:], labels[150:])
    assert (knn_predict(*train, test[0], classes=5) == test[1]).all()
    linear = fit_linear(*train, classes=5, weight_decay=1e-4)
    assert (linear(test[0]).argmax(1) == test[1]).all()


def test_knn_weighs_near_neighbours_more():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    assert knn_predict(train, labels, torch.tensor([[1.0, 0.1]]), classes=2, k=3).item() == 0


def test_linear_probe_finds_the_minimum_of_its_convex_loss():
    x, y = torch.randn(60, 4, dtype=torch.float32), torch.arange(60) % 3
    linear = fit_linear(x, y, classes=3, weight_decay=0.1)
    loss = torch.nn.functional.cross_entropy(linear(x), y) + 0.1 * linear.weight.square().sum()
    gradient = torch.autograd.grad(loss, [*linear.parameters()])
    assert all(g.abs().max() < 1e-3 for g in gradient)


def test_a_class_may_be_empty_in_a_split_and_one_that_train_lacks_is_named(tmp_path):
    for folder in ("train/valve", "train/pump", "test/valve", "test/motor"):
        (tmp_path / folder).mkdir(parents=True)
    for crop in ("train/valve/1", "train/valve/2", "test/valve/1", "test/motor/1"):
        cv2.imwrite(str(tmp_path / f"{crop}.png"), np.full((8, 8), 255, np.uint8))
    classes = class_names(tmp_path, ["train", "test"])
    train, test = (ClassFolder(tmp_path / split, classes, 8, "gray") for split in ("train", "test"))
    assert [label for _, label in train] == [2, 2] and [label for _, label in test] == [0, 2]
    told = unseen(torch.tensor([2, 2]), torch.tensor([0, 2]), classes)
    assert told == "1 test crops are of classes that train lacks: motor"
    assert unseen(torch.tensor([0, 2]), torch.tensor([0, 2]), classes) == ""
    with pytest.raises(DataError, match="no drawings"):
        ClassFolder(tmp_path / "train/pump", classes, 8, "gray")
