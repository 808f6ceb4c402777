import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rankdyna_trainer import LowRankLinear, SingularGroupLinear

WIDE, TALL, SQUARE = (6, 20), (20, 6), (12, 12)
# At full rank one token is cheaper through the factors, 200 are through the rebuilt weight.
FEW, MANY = (1,), (10, 20)
CASES = list(itertools.product([WIDE, TALL, SQUARE], [FEW, MANY], [True, False]))


def make_layer(
    shape: tuple[int, int], rank: int | None = None, bias: bool = True, dtype: torch.dtype = torch.float64
) -> SingularGroupLinear:
    """A layer with random groups: no two factors are orthogonal, since training does not keep them so."""
    out_features, in_features = shape
    rank = min(shape) if rank is None else rank
    u, sigma, v = torch.randn(rank, out_features), torch.rand(rank) + 0.5, torch.randn(rank, in_features)
    parameter = nn.Parameter(torch.randn(out_features).to(dtype)) if bias else None
    return SingularGroupLinear(u.to(dtype), sigma.to(dtype), v.to(dtype), parameter)


def weight_of(u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """Eq. 5, `(out, in)`."""
    return torch.einsum("k,ko,ki->oi", sigma, u, v)


def dense_output(layer: SingularGroupLinear, x: Tensor) -> Tensor:
    return F.linear(x, weight_of(layer.u, layer.sigma, layer.v), layer.bias)


def flops(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(("shape", "batch", "bias"), CASES)
def test_output_is_that_of_the_dense_weight(shape: tuple[int, int], batch: tuple[int, ...], bias: bool) -> None:
    layer = make_layer(shape, bias=bias)
    x = torch.randn(*batch, shape[1], dtype=torch.float64)
    assert layer(x).shape == (*batch, shape[0])
    torch.testing.assert_close(layer(x), dense_output(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,), (2, 5, 7), (0,), (4, 0)])
def test_any_batch_dimensions(batch: tuple[int, ...]) -> None:
    layer = make_layer(WIDE)
    x = torch.randn(*batch, WIDE[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense_output(layer, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [FEW, MANY])
def test_dtypes(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    layer = make_layer(SQUARE, dtype=dtype)
    x = torch.randn(*batch, SQUARE[1]).to(dtype)
    output = layer(x)
    assert output.dtype == layer.weight.dtype == layer.to_dense_weight().dtype == dtype
    expected = dense_output(layer.double(), x.double())
    assert (output.double() - expected).norm() < 4 * torch.finfo(dtype).eps * expected.norm()


def test_importance_stays_float32_when_the_model_is_cast() -> None:
    """A usual score, 1e-8, is zero in float16: all groups would be equal, and the order would decide."""
    layer = make_layer(SQUARE, dtype=torch.float32)
    layer.importance.fill_(1e-8)
    assert torch.equal(layer.half().importance, torch.full((12,), 1e-8))


def test_importance_follows_the_device() -> None:
    """From meta there is nothing to copy: a sharded run makes the tensors empty and fills them."""
    layer = make_layer(SQUARE)
    assert layer.to("meta").importance.is_meta
    assert layer.to_empty(device="cpu").importance.device == torch.device("cpu")
    assert layer.importance.dtype == torch.float32


@pytest.mark.parametrize(("shape", "batch", "bias"), CASES)
def test_gradients_are_those_through_the_dense_weight(
    shape: tuple[int, int], batch: tuple[int, ...], bias: bool
) -> None:
    layer = make_layer(shape, bias=bias)
    x = torch.randn(*batch, shape[1], dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).sin().sum(), leaves)
    expected = torch.autograd.grad(dense_output(layer, x).sin().sum(), leaves)
    for gradient, dense in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("batch", [FEW, MANY])
def test_the_three_gradients_of_a_group_agree(shape: tuple[int, int], batch: tuple[int, ...]) -> None:
    layer = make_layer(shape)
    layer(torch.randn(*batch, shape[1], dtype=torch.float64)).sin().sum().backward()
    by_sigma = layer.sigma * layer.sigma.grad
    assert by_sigma.abs().min() > 0
    torch.testing.assert_close((layer.u * layer.u.grad).sum(dim=1), by_sigma)
    torch.testing.assert_close((layer.v * layer.v.grad).sum(dim=1), by_sigma)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), out=st.integers(1, 24), in_=st.integers(1, 24), tokens=st.integers(1, 60), bias=st.booleans())
def test_the_cheaper_computation_is_taken(data: st.DataObject, out: int, in_: int, tokens: int, bias: bool) -> None:
    rank = data.draw(st.integers(0, min(out, in_)))
    through_factors, through_weight = tokens * rank * (out + in_), out * in_ * (rank + tokens)
    layer = make_layer((out, in_), rank, bias)
    x = torch.zeros(tokens, in_, dtype=torch.float64)
    assert flops(layer, x) == 2 * min(through_factors, through_weight)


def test_both_computations_are_taken_and_cost_follows_rank() -> None:
    x = torch.zeros(*MANY, SQUARE[1], dtype=torch.float64)
    assert flops(make_layer(SQUARE, 12), x) == 2 * 144 * (12 + 200)  # rebuilt: less than 2 * 200 * 12 * 24
    assert flops(make_layer(SQUARE, 2), x) == 2 * 200 * 2 * 24
    assert flops(make_layer(SQUARE, 0), x) == 0


@pytest.mark.parametrize("batch", [FEW, MANY])
def test_zero_group_gets_zero_gradients(batch: tuple[int, ...]) -> None:
    layer = make_layer(SQUARE)
    removed = torch.zeros(12, dtype=torch.bool)
    removed[[2, 7]] = True
    with torch.no_grad():
        for factor in layer.factors().values():
            factor[removed] = 0
    x = torch.randn(*batch, SQUARE[1], dtype=torch.float64)
    layer(x).sin().sum().backward()
    for factor in layer.factors().values():
        assert not factor.grad[removed].any()
        assert factor.grad[~removed].all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [FEW, MANY])
def test_rank_zero_adds_only_the_bias(bias: bool, batch: tuple[int, ...]) -> None:
    layer = make_layer(WIDE, rank=0, bias=bias)
    x = torch.randn(*batch, WIDE[1], dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert torch.equal(output, (layer.bias if bias else torch.zeros(6).double()).expand(*batch, 6))
    output.sum().backward()
    assert not x.grad.any()
    assert not bias or torch.equal(layer.bias.grad, torch.full((6,), float(x.numel() // 20)).double())
    assert layer.rank == layer.parameters_when_compacted == 0
    assert torch.equal(layer.to_dense_weight(), torch.zeros(WIDE).double())


def test_what_stands_for_the_weight_is_saved() -> None:
    for layer in (make_layer(WIDE, dtype=torch.bfloat16), LowRankLinear(20, 6, 2, dtype=torch.bfloat16)):
        saved = layer.state_dict()["weight"]
        assert saved.shape == (2,)
        assert saved.dtype == layer.weight.dtype == torch.bfloat16


def test_what_stands_for_the_weight_stops_a_stock_layer_from_loading() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .*torch.Size\(\[2\]\)"):
        nn.Linear(20, 6).load_state_dict(make_layer(WIDE).state_dict(), strict=False)


def test_groups_that_do_not_remain_are_not_counted() -> None:
    layer = make_layer(WIDE)
    assert (layer.full_rank, layer.rank, layer.width) == (6, 6, 6)
    assert (layer.dense_parameters, layer.group_parameters) == (120, 26)
    assert layer.parameters_when_compacted == 120  # 6 * 26 is more
    kept = torch.tensor([True, False, True, False, False, True])
    layer.set_remaining(kept)
    assert (layer.full_rank, layer.rank, layer.width, layer.parameters_when_compacted) == (6, 3, 6, 78)
    p, q = layer.to_factors()
    assert (p.shape, q.shape) == ((6, 3), (3, 20))
    torch.testing.assert_close(p @ q, weight_of(layer.u[kept], layer.sigma[kept], layer.v[kept]))
    torch.testing.assert_close(layer.to_dense_weight(), p @ q)


def test_dense_weight_is_rounded_once() -> None:
    layer = make_layer(SQUARE, dtype=torch.bfloat16)
    exact = weight_of(layer.u.float(), layer.sigma.float(), layer.v.float())
    torch.testing.assert_close(layer.to_dense_weight(), exact.bfloat16(), rtol=2**-8, atol=0)

    low_rank = LowRankLinear(64, 5, 32, dtype=torch.bfloat16)
    for part in (low_rank.p, low_rank.q):
        nn.init.normal_(part.weight)
    exact = low_rank.p.weight.double() @ low_rank.q.weight.double()
    assert (low_rank.to_dense_weight() - exact).norm() < 2**-8 * exact.norm()


def test_neither_form_draws_random_numbers() -> None:
    before = torch.get_rng_state()
    LowRankLinear(20, 6, 3)
    SingularGroupLinear(torch.zeros(2, 6), torch.zeros(2), torch.zeros(2, 20))
    assert torch.equal(torch.get_rng_state(), before)


def test_repr_tells_the_rank() -> None:
    for layer in (make_layer(WIDE, rank=3), LowRankLinear(20, 6, 3)):
        assert "in_features=20, out_features=6, rank=3" in repr(layer)


@pytest.mark.parametrize(("current", "saved"), [(6, 4), (4, 6), (6, 0), (0, 6), (5, 5)])
def test_a_checkpoint_sets_the_width(current: int, saved: int) -> None:
    source, layer = make_layer(WIDE, saved), make_layer(WIDE, current)
    source.importance.uniform_()
    source.set_remaining(torch.arange(saved) % 2 == 0)
    layer.load_state_dict(source.state_dict())
    assert (layer.width, layer.rank) == (saved, (saved + 1) // 2)
    for name, value in source.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    x = torch.randn(4, 20, dtype=torch.float64)
    assert torch.equal(layer(x), source(x))
    assert all(factor.requires_grad for factor in layer.factors().values())


def test_a_checkpoint_sets_the_width_inside_a_model() -> None:
    source = nn.ModuleDict({"a": make_layer(WIDE, 2), "b": make_layer(TALL, 6)})
    model = nn.ModuleDict({"a": make_layer(WIDE), "b": make_layer(TALL)})
    model.load_state_dict(source.state_dict())
    assert (model["a"].width, model["b"].width) == (2, 6)
    assert torch.equal(model["a"].u, source["a"].u)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (None, None, "sigma"),  # a wider checkpoint than the weight has groups
        ("u", torch.zeros(3, 6), "u"),
        ("v", torch.zeros(4, 21), "v"),
        ("importance", torch.zeros(6), "importance"),
        ("remaining", torch.zeros(3, dtype=torch.bool), "remaining"),
        ("sigma", torch.zeros(4, 1), "sigma"),
        ("weight", torch.zeros(6, 20), "weight"),
    ],
)
def test_a_checkpoint_of_another_layer_is_refused(key: str | None, value: Tensor | None, named: str) -> None:
    state = make_layer(WIDE, 7 if key is None else 4).state_dict()
    if key is not None:
        state[key] = value
    with pytest.raises(RuntimeError, match=f"size mismatch for {named}:"):
        make_layer(WIDE).load_state_dict(state)


@pytest.mark.parametrize("copied", [False, True])
def test_a_mask_that_others_write_into_is_followed(copied: bool) -> None:
    """As an average of the model has it: its buffers are copied in place, and it leaves out what the model does."""
    trained = SingularGroupLinear(torch.randn(5, 4), torch.rand(5) + 0.5, torch.randn(5, 3))
    trained.leave_out_removed()
    other = (
        copy.deepcopy(trained) if copied else SingularGroupLinear(torch.ones(5, 4), torch.ones(5), torch.ones(5, 3))
    )
    other.leave_out_removed()
    x = torch.randn(2, 3)
    other(x)
    assert (other.rank, other.computed) == (5, None)
    for remaining in (torch.arange(5) < 3, torch.arange(5) == 1):
        trained.set_remaining(remaining)
        assert len(list(trained.buffers())) == len(list(other.buffers()))
        for buffer, now in zip(other.buffers(), trained.buffers(), strict=True):
            buffer.copy_(now)
        kept = remaining.nonzero().squeeze(1)
        assert other.rank == len(kept) and torch.equal(other.remaining_on_cpu, remaining)
        assert torch.equal(other.computed, kept)
        weight = (other.u[kept].T * other.sigma[kept]) @ other.v[kept]
        torch.testing.assert_close(other(x), x @ weight.T)
