"""What `save_pretrained` writes of a model's ranks: importing this module lets it ask the layers."""

import functools
from typing import Any

from transformers import PreTrainedModel

from ..layers.auto_map import mapped_as_it_is
from ..layers.rank_record import recorded_as_it_is

_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def _with_true_ranks(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    with recorded_as_it_is(self), mapped_as_it_is(self):
        return _save_pretrained(self, *args, **kwargs)


# There is no hook for it, and what may be saved, a part of a compacted model or a model that has got one as a part, is
# of a class that knows nothing of ranks.
PreTrainedModel.save_pretrained = _with_true_ranks
