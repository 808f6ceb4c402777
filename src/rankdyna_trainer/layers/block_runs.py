"""A model run up to one of its blocks, without computing again what the blocks before it have computed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .architecture import block_prefixes


class _Call(NamedTuple):
    block: nn.Module
    given: object
    output: Any


class _Done(Exception):
    """The block that a run is made for has done its work."""


class BlockRuns:
    """
    Runs a model on batches as far as one block after another, in the order in which the model calls them.

    The model's own code runs each time, and makes masks and positions as ever. But a block that is finished is not
    computed again: it gives what it has given, which is kept for each batch, of the last block and of the last one of
    each stack, such as an encoder. All others give zeros of the same shape. Whether that will do is tried on the first
    batch, on which each block must be given exactly what it is given in a whole run. It will not for a model that uses
    what a block gave further on than in the next one; then nothing is kept, and all blocks are computed in each run.

    Args:
        model: in evaluation mode.
        batches: at least one of what `call` takes.
        call: runs the model on a batch.

    Attributes:
        blocks: the repeated blocks that the first batch reaches, in the order of their first calls.
        keeps: whether finished blocks are left out of the runs.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], call: Callable[[Any], object]) -> None:
        self._batches, self._call = batches, call
        stacks = [model.get_submodule(prefix.removesuffix(".")) for prefix in block_prefixes(model)]
        self._stack_of = {block: stack for stack in stacks for block in stack.children()}
        self._kept: dict[nn.Module, list[list[Any]]] = {}
        with _calls_noted(self._stack_of) as calls:
            call(batches[0])
        self._calls_of = {call.block: sum(other.block is call.block for other in calls) for call in calls}
        self.blocks = list(self._calls_of)
        self.keeps = self._will_do(calls)

    def run_to(self, block: nn.Module, batch: int) -> None:
        """
        Run the model until a block has done its work.

        Args:
            block: one of `blocks`; those before it are finished.
            batch: its number.
        """
        with ExitStack() as changes:
            for finished, outputs in self._kept.items():
                changes.enter_context(_giving(finished, outputs[batch]))
            changes.enter_context(_stopping_after(block, self._calls_of[block]))
            self._call(self._batches[batch])

    def finish(self, block: nn.Module) -> None:
        """
        Compute what a block gives, for the runs to those after it.

        Args:
            block: one of `blocks`, which will not change any more; those before it are finished.
        """
        if self.keeps:
            self._keep(block, [self._outputs(block, batch) for batch in range(len(self._batches))])

    def _outputs(self, block: nn.Module, batch: int) -> list[Any]:
        with _calls_noted([block]) as calls:
            self.run_to(block, batch)
        return [call.output for call in calls]

    def _keep(self, block: nn.Module, outputs: list[list[Any]]) -> None:
        previous = next(reversed(self._kept), None)
        self._kept[block] = outputs
        if previous is not None and self._stack_of[previous] is self._stack_of[block]:
            self._kept[previous] = [[_zeros(output) for output in calls] for calls in self._kept[previous]]

    def _will_do(self, whole: Sequence[_Call]) -> bool:
        try:
            for block in self.blocks:
                of_block = [call for call in whole if call.block is block]
                with _calls_noted([block]) as calls, suppress(Exception):  # of a model that has no use for zeros
                    self.run_to(block, 0)
                if not _alike([call.given for call in of_block], [call.given for call in calls]):
                    return False
                self._keep(block, [[call.output for call in of_block]])
            return True
        finally:
            self._kept = {}


@contextmanager
def _calls_noted(blocks: Iterable[nn.Module]) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def note(block: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        calls.append(_Call(block, (inputs, named), output))

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _stopping_after(block: nn.Module, calls: int) -> Iterator[None]:
    left = calls

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise _Done

    handle = block.register_forward_hook(count)
    try:
        with suppress(_Done):
            yield
    finally:
        handle.remove()


@contextmanager
def _giving(block: nn.Module, outputs: Sequence[Any]) -> Iterator[None]:
    """With a block that gives these outputs, one after another, and computes only what they do not have."""
    own = block.__dict__.get("forward")
    compute, left = block.forward, list(outputs)

    def give(*inputs: Any, **named: Any) -> Any:
        return _with_first(left.pop(0), _copy) if left else compute(*inputs, **named)

    block.__dict__["forward"] = give
    try:
        yield
    finally:
        if own is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = own


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output of a block with another first tensor, which is what the next block is given."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)([change(output[0]), *output[1:]])
    return output


def _copy(tensor: Tensor) -> Tensor:
    # The model may write into what a block gives.
    return tensor.clone(memory_format=torch.contiguous_format)


def _zeros(output: Any) -> Any:
    """The same without the numbers, and without the memory for them."""
    return _with_first(output, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))


def _alike(first: object, second: object) -> bool:
    """Whether what blocks were given holds the same tensors."""
    tensors = list(_tensors(first)), list(_tensors(second))
    return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


def _tensors(given: object) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list)):
        for part in given:
            yield from _tensors(part)
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))
