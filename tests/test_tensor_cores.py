"""TF32 products keep both losses within 1e-4, and the switch is put back."""

import pytest
import torch
import torch.nn.functional as F

from cluster.tensor_cores import tensor_cores

CUDA = torch.device("cuda", 0)  # only named: the switch needs no GPU


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x as a GPU takes it into a TF32 product: 10 bits of the mantissa, the nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def embeddings(n: int, d: int, shared: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views [n, d] that differ a little; `shared` of their variation lies in 8 directions."""
    draw = torch.Generator().manual_seed(0)
    within = torch.randn(n, 8, generator=draw) @ torch.randn(8, d, generator=draw)
    z = (1 - shared) * torch.randn(n, d, generator=draw) + shared * within
    return z, z + 0.3 * torch.randn(n, d, generator=draw)


def test_rounding_is_that_of_tf32():
    assert rounded(torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11])).tolist() == [
        1 + 2**-10,
        1.0,
        1 + 2**-9,
    ]


@pytest.mark.parametrize("n, d", [(128, 2048), (512, 256)])
@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_products_in_tf32_keep_both_losses_within_1e_4(n, d, shared):
    z1, z2 = embeddings(n, d, shared)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    losses = []
    for similarity in ((z / 0.1) @ z.T, rounded(z / 0.1) @ rounded(z).T):
        similarity.fill_diagonal_(float("-inf"))
        losses.append(F.cross_entropy(similarity, torch.arange(2 * n).roll(n)).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    centred = z1 - z1.mean(0)
    products = (a @ a.T for a in (centred, rounded(centred)))
    variances = centred.double().square().sum(0).square().sum()
    exact, fast = ((product.double().square().sum() - variances).item() for product in products)
    assert fast == pytest.approx(exact, rel=1e-4)


def test_the_switch_is_put_back_even_after_an_error_and_is_left_alone_on_a_cpu():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), tensor_cores(CUDA):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with tensor_cores(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
