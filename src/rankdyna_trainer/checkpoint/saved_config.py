"""What `save_pretrained` writes into the configuration of a model: what its layers are, whatever is noted there."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from ..layers.auto_map import mapped_as_it_is
from ..layers.rank_record import recorded_as_it_is


@contextmanager
def configured_as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """Let the configuration of a model that is saved be true, until the block ends."""
    with recorded_as_it_is(model), mapped_as_it_is(model):
        yield
