"""The decomposition by cuSOLVER against the one by LAPACK."""

import pytest
import torch
from torch import Tensor

from rankdyna_trainer.layers.factorization import factorize, factorize_product
from rankdyna_trainer.layers.whitening import metric_root, whitened_factors


def rebuilt(factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    u, sigma, v = (factor.cpu() for factor in factors)
    return (u.t() * sigma) @ v


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found.cpu() - expected).abs() / expected.abs()).max())


@pytest.mark.parametrize("shape", [(256, 256), (512, 192), (192, 512)])
def test_as_on_the_cpu(device: torch.device, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    expected, found = factorize(weight), factorize(weight.to(device))
    assert {factor.device.type for factor in found} == {device.type}
    difference = relative(found[1], expected[1])
    assert difference < 1e-10, f"singular values differ by {difference}"
    for factors in (expected, found):
        error = float((rebuilt(factors) - weight).abs().max())
        assert error < 1e-10, f"the weight is rebuilt with an error of {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_numbers_are_decomposed_in_float64(device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.randn(192, 128).to(dtype)
    expected, found = factorize(weight), factorize(weight.to(device))
    assert {factor.dtype for factor in found} == {dtype}
    # In these numbers the exact values are rounded, so that they differ by one unit of the last place at most.
    difference = relative(found[1].float(), expected[1].float())
    assert difference <= torch.finfo(dtype).eps, f"singular values differ by {difference}"


def test_a_product_and_the_metric_of_inputs(device: torch.device) -> None:
    p, q = torch.randn(96, 24, dtype=torch.float64), torch.randn(24, 64, dtype=torch.float64)
    x = torch.randn(400, 64, dtype=torch.float64) * torch.logspace(0, -3, 64, dtype=torch.float64)
    moment = x.t() @ x
    for name, make in {
        "product": lambda where: factorize_product(p.to(where), q.to(where)),
        "inputs": lambda where: whitened_factors(None, (p @ q).to(where), metric_root(moment.to(where))),
        "inputs of a product": lambda where: whitened_factors(p.to(where), q.to(where), metric_root(moment.to(where))),
    }.items():
        expected, found = make("cpu"), make(device)
        # Beyond the rank of the product the groups are rounding alone.
        difference = relative(found[1][:24], expected[1][:24])
        error = float((rebuilt(found) - p @ q).abs().max())
        assert difference < 1e-9 and error < 1e-10, f"{name}: sigma differs by {difference}, the product by {error}"
