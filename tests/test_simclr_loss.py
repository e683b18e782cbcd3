"""NT-Xent equals its paper, and its known values."""

import math

import pytest
import torch

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


def test_perfect_pairs_reach_accuracy_one_and_swapping_the_views_changes_nothing():
    z = torch.eye(8) * 3
    loss, terms = nt_xent(z, z, 0.1)
    assert terms["accuracy"] == 1
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
