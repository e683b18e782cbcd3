"""VICReg's loss equals its paper, in both ways of computing the covariance."""

import pytest
import torch

from vicreg import loss as module
from vicreg.loss import hinge, moments, vicreg_loss


def transcription(z1, z2, lam, mu, nu):
    """Equations (1) to (6) of arXiv 2105.04906 scaled as its Algorithm 1, in plain floats."""
    n, d = z1.shape

    def mean(z, j):
        return sum(float(z[i, j]) for i in range(n)) / n

    def cov(z, a, b):
        return sum((float(z[i, a]) - mean(z, a)) * (float(z[i, b]) - mean(z, b)) for i in range(n)) / (n - 1)

    def v(z):
        return sum(max(0.0, 1 - (cov(z, j, j) + 1e-4) ** 0.5) for j in range(d)) / d

    def c(z):
        return sum(cov(z, a, b) ** 2 for a in range(d) for b in range(d) if a != b) / d

    s = sum(float((z1[i, j] - z2[i, j]) ** 2) for i in range(n) for j in range(d)) / (n * d)
    return lam * s + mu * (v(z1) + v(z2)) / 2 + nu * (c(z1) + c(z2))


@pytest.mark.parametrize(("n", "d"), [(5, 9), (9, 5), (6, 6)])  # fewer samples than dimensions, more, as many
def test_equals_a_transcription_of_the_paper(n, d):
    generator = torch.Generator().manual_seed(n)
    z1, z2 = torch.randn(2, n, d, generator=generator, dtype=torch.float64) * 0.7 + 0.3
    loss, _ = vicreg_loss(z1.float(), z2.float(), 25.0, 25.0, 1.0)
    assert loss.item() == pytest.approx(transcription(z1, z2, 25.0, 25.0, 1.0), rel=1e-5)


@pytest.mark.parametrize("block", [5, 1024])  # more than one, of unequal sizes; one
@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 12), (12, 12)])
def test_both_products_give_the_moments_and_their_gradients(n, d, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "ROWS", block - 1)
    generator = torch.Generator().manual_seed(n)
    z = (torch.randn(n, d, dtype=torch.float64, generator=generator) + 3).requires_grad_()
    weight = torch.randn(d, dtype=torch.float64, generator=generator)
    direct = torch.cov(z.T)
    off = (direct.square().sum() - direct.diagonal().square().sum()) / d
    variance, covariance = moments(z)
    torch.testing.assert_close((variance, covariance), (z.var(dim=0), off))
    ours = torch.autograd.grad(3 * covariance + weight @ variance, z)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(3 * off + weight @ z.var(dim=0), z)[0])


def test_float32_gram_is_exact_enough_at_the_published_width():
    z = torch.randn(128, 8192, generator=torch.Generator().manual_seed(0)) + 2
    assert moments(z)[1].item() == pytest.approx(moments(z.double())[1].item(), rel=1e-5)


def test_collapse_is_what_the_variance_term_sees():
    assert hinge(moments(torch.ones(8, 4))[0]).item() == pytest.approx(1 - 1e-2)  # 1 - sqrt(eps)
    assert hinge(moments(2 * torch.randn(4096, 4))[0]).item() == 0
    independent = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert moments(independent)[1].item() == 0


def test_computed_in_float32_where_half_precision_overflows():
    z = (torch.randn(64, 32) * 300).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms = vicreg_loss(z, z)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss) and torch.isfinite(terms["covariance"])


def test_refuses_a_batch_without_variance():
    with pytest.raises(ValueError, match="N >= 2"):
        vicreg_loss(torch.randn(1, 4), torch.randn(1, 4))
