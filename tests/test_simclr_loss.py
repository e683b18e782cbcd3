"""NT-Xent equals its paper, and its known values."""

import math

import pytest
import torch
from torch import nn

from simclr import loss as module
from simclr.loss import nt_xent


def transcription(z1, z2, temperature):
    """Equation (1) and Algorithm 1 of arXiv 2002.05709, pair by pair in plain Python floats."""
    n = len(z1)
    z = [None] * (2 * n)
    for k in range(n):  # the paper's z_{2k-1}, z_{2k}
        z[2 * k], z[2 * k + 1] = z1[k].tolist(), z2[k].tolist()

    def similarity(u, v):
        return sum(a * b for a, b in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)

    def pair_loss(i, j):
        others = sum(math.exp(similarity(z[i], z[k]) / temperature) for k in range(2 * n) if k != i)
        return -math.log(math.exp(similarity(z[i], z[j]) / temperature) / others)

    return sum(pair_loss(2 * k, 2 * k + 1) + pair_loss(2 * k + 1, 2 * k) for k in range(n)) / (2 * n)


@pytest.mark.parametrize(("n", "d", "temperature"), [(2, 3, 0.5), (7, 16, 0.1), (33, 8, 0.07)])
def test_equals_a_transcription_of_the_paper(n, d, temperature):
    generator = torch.Generator().manual_seed(n)
    z1, z2 = torch.randn(2, n, d, generator=generator, dtype=torch.float64).float()
    loss, _ = nt_xent(z1, z2, temperature)
    assert loss.item() == pytest.approx(transcription(z1.double(), z2.double(), temperature), rel=2e-6)


def test_equal_embeddings_give_log_2n_minus_1():
    z = torch.ones(16, 8)
    assert nt_xent(z, z, 0.1)[0].item() == pytest.approx(math.log(31), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.01])  # at which unscaled exponentials underflow
@pytest.mark.parametrize("side", [4, 7, 64])  # tiles that do and do not divide 2N, and one for all
def test_tiles_give_the_loss_and_the_gradient_of_the_formula(side, temperature, monkeypatch):
    monkeypatch.setitem(module.TILE, "cpu", side)
    generator = torch.Generator().manual_seed(side)
    z1, z2 = torch.randn(2, 15, 6, generator=generator).requires_grad_()
    z = nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    direct = nn.functional.cross_entropy(similarity, torch.arange(30).roll(15))
    loss, _ = nt_xent(z1, z2, temperature)
    assert loss.item() == pytest.approx(direct.item(), rel=2e-6)
    for ours, exact in zip(*(torch.autograd.grad(f, (z1, z2)) for f in (2 * loss, 2 * direct)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6 / temperature)


def test_embeddings_that_are_not_finite_give_a_loss_that_is_not():
    z = torch.ones(4, 3)
    z[1, 2] = torch.nan
    assert nt_xent(z, torch.ones(4, 3))[0].isnan()


def test_perfect_pairs_have_their_known_loss_and_swapping_the_views_changes_nothing():
    z = torch.eye(8) * 3
    loss, _ = nt_xent(z, z, 0.1)
    # one positive at similarity 1, 14 negatives at 0
    assert loss.item() == pytest.approx(math.log(1 + 14 * math.exp(-10)), rel=1e-3)
    a, b = torch.randn(2, 8, 8)
    torch.testing.assert_close(nt_xent(a, b)[0], nt_xent(b, a)[0])


def test_computed_in_float32_under_autocast():
    z1, z2 = torch.randn(2, 16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = nt_xent(z1, z2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent(z1, z2)[0])


def test_refuses_a_batch_without_negatives():
    with pytest.raises(ValueError, match="N >= 2"):
        nt_xent(torch.randn(1, 4), torch.randn(1, 4))
