from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rankdyna_trainer import RankDynaConfig
from rankdyna_trainer.baselines.fisher import fisher_information
from rankdyna_trainer.layers.dense import DenseLayer, dense_weight
from rankdyna_trainer.layers.targets import find_targets

Batch = dict[str, Tensor]

CONFIG = RankDynaConfig(rank_ratio=0.5)


def plain_loop(model: nn.Module, layers: dict[str, DenseLayer], groups: list[Batch]) -> dict[str, Tensor]:
    """The mean over the groups of examples of the squared gradient of each group's loss."""
    sums = {name: torch.zeros_like(dense_weight(layer)) for name, layer in layers.items()}
    for group in groups:
        model.zero_grad()
        model(**group).loss.backward()
        for name, layer in layers.items():
            gradient = layer.weight.grad
            sums[name] += (gradient.t() if isinstance(layer, Conv1D) else gradient) ** 2 / len(groups)
    model.zero_grad()
    return {name: values.detach() for name, values in sums.items()}


def single(batches: list[Batch]) -> list[Batch]:
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert values.max() > 0
        assert (actual[name] - values).norm() <= 1e-10 * values.norm()


class Classifier(nn.Module):
    """One layer, on vectors; the loss is whatever a test wants."""

    def __init__(self, loss: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(loss=self.loss(self.layer(x), labels))

    @property
    def layers(self) -> dict[str, DenseLayer]:
        return {"layer": self.layer}


def cross_entropy(outputs: Tensor, labels: Tensor | None) -> Tensor | None:
    return None if labels is None else nn.functional.cross_entropy(outputs, labels)


def vectors(size: int = 4) -> Batch:
    return {"x": torch.randn(size, 3), "labels": torch.arange(size) % 5}


def test_mean_of_squared_gradients_of_single_examples(model: nn.Module, batches: list[Batch]) -> None:
    layers = find_targets(model.double(), CONFIG)
    expected = plain_loop(model, layers, single(batches))
    actual = fisher_information(model, layers, batches)
    assert_equal(actual, expected)
    assert all(actual[name].shape == dense_weight(layer).shape for name, layer in layers.items())


def test_how_examples_are_batched_does_not_matter(
    tiny_bert: BertForSequenceClassification, batches: list[Batch]
) -> None:
    layers = find_targets(tiny_bert.double(), CONFIG)
    whole = [{key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}]
    assert_equal(fisher_information(tiny_bert, layers, whole), fisher_information(tiny_bert, layers, batches))


def test_per_batch_squares_the_gradient_of_the_batch(model: nn.Module, batches: list[Batch]) -> None:
    layers = find_targets(model.double(), CONFIG)
    actual = fisher_information(model, layers, batches, per_example=False)
    assert_equal(actual, plain_loop(model, layers, batches))
    per_example = fisher_information(model, layers, batches)
    assert all(values.sum() < per_example[name].sum() for name, values in actual.items())


def test_per_batch_is_smaller_by_the_batch_size_where_the_mean_gradient_is_zero() -> None:
    """As the docstring says: `(E[g^2] - E[g]^2) / batch size + E[g]^2`, for batches drawn at random."""
    model = Classifier(cross_entropy).double()
    rows = {"x": torch.randn(40, 3, dtype=torch.float64), "labels": torch.randint(5, (40,))}
    square = fisher_information(model, model.layers, [rows])["layer"]
    mean = fisher_information(model, model.layers, [rows], per_example=False)["layer"]  # E[g]^2: of all rows at once
    draws = torch.randint(40, (4000, 8))
    drawn = [{key: value[draw] for key, value in rows.items()} for draw in draws]
    actual = fisher_information(model, model.layers, drawn, per_example=False)["layer"]
    expected = (square - mean) / 8 + mean
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_layer_that_is_called_several_times(batches: list[Batch]) -> None:
    """ALBERT's blocks share their layers: the gradient of an example is the sum over the calls, squared once."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 64, "num_attention_heads": 4}
    config = AlbertConfig(vocab_size=64, num_hidden_layers=3, max_position_embeddings=32, **sizes)
    model = AlbertForSequenceClassification(config).eval().double()
    layers = find_targets(model, CONFIG)
    assert_equal(fisher_information(model, layers, batches), plain_loop(model, layers, single(batches)))


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(tiny_bert: BertForSequenceClassification, batches: list[Batch], fails: bool) -> None:
    layers = find_targets(tiny_bert, CONFIG)
    tiny_bert.train()
    tiny_bert.bert.encoder.layer[1].eval()
    tiny_bert.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    gradient = torch.randn(32, 32)
    kept = gradient.clone()
    layers["bert.encoder.layer.0.attention.self.query"].weight.grad = gradient
    modes = [module.training for module in tiny_bert.modules()]
    weights = {name: parameter.detach().clone() for name, parameter in tiny_bert.named_parameters()}
    frozen = [name for name, parameter in tiny_bert.named_parameters() if not parameter.requires_grad]

    if fails:
        with pytest.raises(ValueError, match="returned no loss"):
            fisher_information(tiny_bert, layers, [batches[0], {"input_ids": batches[0]["input_ids"]}])
    else:
        fisher_information(tiny_bert, layers, batches)

    assert [module.training for module in tiny_bert.modules()] == modes
    assert [name for name, parameter in tiny_bert.named_parameters() if not parameter.requires_grad] == frozen
    held = {name: parameter.grad for name, parameter in tiny_bert.named_parameters() if parameter.grad is not None}
    assert list(held) == ["bert.encoder.layer.0.attention.self.query.weight"]
    assert held.popitem()[1] is gradient and torch.equal(gradient, kept)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in tiny_bert.named_parameters())
    tiny_bert(**batches[0]).loss.backward()
    assert all(layer.weight.grad is not None for layer in layers.values())  # no hook takes it away any more


def test_dropout_is_off(tiny_bert: BertForSequenceClassification, batches: list[Batch]) -> None:
    layers = find_targets(tiny_bert.double(), CONFIG)
    expected = fisher_information(tiny_bert, layers, batches)
    random_state = torch.get_rng_state()
    assert_equal(fisher_information(tiny_bert.train(), layers, batches), expected)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_gradients_of_two_layers_are_never_held_at_once(
    tiny_bert: BertForSequenceClassification, batches: list[Batch]
) -> None:
    layers = find_targets(tiny_bert, CONFIG)
    held: list[int] = []

    def count(_: Tensor) -> None:
        held.append(sum(parameter.grad is not None for parameter in tiny_bert.parameters()))

    for layer in layers.values():
        layer.weight.register_post_accumulate_grad_hook(count)
    fisher_information(tiny_bert, layers, batches)
    assert held == [1] * len(layers) * 10


def test_inside_of_no_grad(tiny_bert: BertForSequenceClassification, batches: list[Batch]) -> None:
    layers = find_targets(tiny_bert.double(), CONFIG)
    expected = fisher_information(tiny_bert, layers, batches)
    with torch.no_grad():
        assert_equal(fisher_information(tiny_bert, layers, batches), expected)


def test_half_precision_is_summed_in_float32(tiny_bert: BertForSequenceClassification, batches: list[Batch]) -> None:
    exact = fisher_information(tiny_bert, find_targets(tiny_bert, CONFIG), batches)
    tiny_bert.bfloat16()
    rounded = fisher_information(tiny_bert, find_targets(tiny_bert, CONFIG), batches)
    for name, values in exact.items():
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - values).norm() < 0.1 * values.norm()


def test_small_gradients_are_not_lost_in_half_precision() -> None:
    """The square of 1e-4 is below what float16 can hold."""
    model = Classifier(lambda outputs, _: (outputs * 1e-4).sum()).half()
    x = torch.ones(2, 3, dtype=torch.float16)
    fisher = fisher_information(model, model.layers, [{"x": x}])["layer"]
    torch.testing.assert_close(fisher, torch.full((5, 3), 1e-8), rtol=0.01, atol=0)


def test_a_stream_of_batches_with_entries_that_are_no_tensors() -> None:
    model = Classifier(cross_entropy)
    batch = vectors()
    model.forward = lambda x, labels, note: SimpleNamespace(  # type: ignore[assignment,misc]
        loss=cross_entropy(model.layer(x), labels) if note == "a note" else None
    )
    expected = plain_loop(model, model.layers, [row | {"note": "a note"} for row in single([batch])])
    actual = fisher_information(model, model.layers, iter([batch | {"note": "a note"}]))
    torch.testing.assert_close(actual, expected)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model = Classifier(cross_entropy)
    fisher_information(model, model.layers, [vectors(), vectors()])
    error = capsys.readouterr().err
    assert "Estimating Fisher information: 100%" in error and "2/2" in error


def test_no_layers_need_no_data() -> None:
    assert fisher_information(Classifier(cross_entropy), {}, []) == {}


@pytest.mark.parametrize(
    ("dataloader", "exception", "message"),
    [
        (None, TypeError, "dataloader must give batches, as .*got a NoneType"),
        (vectors(), TypeError, "dataloader must give batches, as .*got a dict"),
        ([], ValueError, "no data to estimate the Fisher information on: the dataloader is empty"),
        ([{"x": torch.zeros(0, 3), "labels": torch.zeros(0)}], ValueError, "the dataloader is empty"),
        ([vectors(), [1, 2]], TypeError, r"mapping from the model's arguments to tensors.*batch 2 is \[1, 2\]"),
        ([{"x": [[1.0, 2.0, 3.0]]}], TypeError, r"batch 1 is \{'x': \[\[1.0"),
        ([vectors() | {"labels": torch.tensor(1)}], ValueError, r"dimension 0.*batch 1.*'labels': \(\)"),
        ([vectors() | {"labels": torch.arange(3)}], ValueError, r"'labels': \(3,\), 'x': \(4, 3\)"),
        ([{"x": torch.randn(2, 3)}], ValueError, "Classifier returned no loss for a batch with x: .* labels"),
        ([vectors(), vectors() | {"labels": torch.full((4,), -100)}], ValueError, "The loss of example 5 is .*nan"),
    ],
)
@pytest.mark.parametrize("per_example", [True, False])
def test_bad_data(dataloader: object, exception: type[Exception], message: str, per_example: bool) -> None:
    model = Classifier(cross_entropy)
    if not per_example:
        message = message.replace("example 5", "batch 2")
    with pytest.raises(exception, match=message):
        fisher_information(model, model.layers, dataloader, per_example)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, _: outputs, r"The loss of example 1 is .*instead of one finite number"),
        (lambda outputs, _: outputs.sum().detach(), "does not depend on any weight that requires gradients"),
        (lambda outputs, _: outputs.sum() * torch.inf, "The loss of example 1 is"),
        (lambda outputs, _: (outputs * 0).sum().sqrt(), "The gradient of layer has inf or nan in batch 1"),
        (lambda outputs, _: (outputs * 1e25).sum(), "The gradient of layer has inf or nan in batch 1, or its square"),
    ],
)
def test_bad_loss(loss: Callable[..., object], message: str) -> None:
    model = Classifier(loss)
    with pytest.raises(ValueError, match=message):
        fisher_information(model, model.layers, [vectors()])


def test_layer_without_gradient_is_named() -> None:
    model = Classifier(cross_entropy)
    model.unused = nn.Linear(2, 2)
    layers = model.layers | {"unused": model.unused}
    message = r"gives 1 of 2 target layers no gradient \(unused, ...\).*exclude_modules"
    with pytest.raises(ValueError, match=message):
        fisher_information(model, layers, [vectors()])
