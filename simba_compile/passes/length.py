"""Where a value of the graph has its tokens: the axis whose symbolic size is the sequence length."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

NO_TOKENS = -1  # the value has no token axis
UNCLEAR = -2  # it depends on the length in another way: shifted, or along two axes
FLAT = -3  # axis 0 is batch and tokens in one, as a mixture of experts takes them


def value_of(node: Any) -> Any:
    """What Dynamo saw at a node: a fake tensor, a SymInt, a tuple of them. None for what is no node."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def traced(size: Any) -> int:
    """A size as it was in the call that the graph was traced for."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


class Length:
    """How many tokens a graph's mixers work on, as an expression of its inputs' sizes, and the axes that have it.

    Mostly that is an input's length. It may be one with some tokens more or fewer, as where a model puts a class token or
    the virtual tokens of prompt tuning before the others, and it may be the sum of several.

    Parameters
    ----------
    example : Tensor
        Any value of shape (batch, token, ...).
    """

    def __init__(self, example: Tensor) -> None:
        self.tokens = expression(example.shape[1])
        self.batch = expression(example.shape[0])
        self.rows = sympy.expand(self.batch * self.tokens)
        self.symbols = self.tokens.free_symbols
        self.terms = {symbol: self.tokens.coeff(symbol) for symbol in sorted(self.symbols, key=str)}
        self.fixed = self.tokens - sum(often * symbol for symbol, often in self.terms.items())
        self.is_sum = self.fixed.is_Integer and all(often.is_Integer and often > 0 for often in self.terms.values())

    @property
    def is_symbolic(self) -> bool:
        """Whether the length can vary, as a sum of sizes, and is not tied to the batch size."""
        return bool(self.symbols) and self.is_sum and not self.symbols & self.batch.free_symbols

    def depends(self, size: Any) -> bool:
        """Whether a size varies with the length."""
        return bool(expression(size).free_symbols & self.symbols) if isinstance(size, torch.SymInt) else False

    def axis(self, value: Any) -> int:
        """The token axis of a tensor, or of the tensors of a tuple that have one; NO_TOKENS, UNCLEAR or FLAT."""
        if isinstance(value, list | tuple):
            axes = {self.axis(item) for item in value} - {NO_TOKENS}
            return axes.pop() if len(axes) == 1 else UNCLEAR if axes else NO_TOKENS
        if isinstance(value, torch.SymInt):
            return UNCLEAR if self.depends(value) else NO_TOKENS
        if not isinstance(value, Tensor):
            return NO_TOKENS
        depends = [axis for axis, size in enumerate(value.shape) if self.depends(size)]
        if not depends:
            return NO_TOKENS
        if depends == [0] and sympy.expand(expression(value.shape[0])) == self.rows:
            return FLAT
        return depends[0] if len(depends) == 1 and expression(value.shape[depends[0]]) == self.tokens else UNCLEAR

    def is_square(self, value: Any) -> bool:
        """Whether it is a mask of attention: its last two axes have the length, and no other."""
        if not isinstance(value, Tensor) or value.dim() < 2:
            return False
        *others, queries, keys = value.shape
        return expression(queries) == expression(keys) == self.tokens and not any(map(self.depends, others))

    def of(self, node: Any) -> int:
        """The token axis of a node's value."""
        return self.axis(value_of(node))

    def is_number(self, node: Node) -> bool:
        """Whether the node is an integer that depends on the length, or a tuple of integers such as a shape."""
        value = value_of(node)
        items = value if isinstance(value, list | tuple) else [value]
        return any(map(self.depends, items)) and all(isinstance(item, int | torch.SymInt) for item in items)

    def find(self, inputs: Iterable[Node]) -> list[tuple[int, int | None]]:
        """Where a call's arguments show the sizes whose sum, with `fixed`, is the length.

        Each is (argument, axis), or (argument, None) where the argument is the size.
        """
        if not self.is_sum:
            raise ValueError(f"the length {self.tokens} is no sum of sizes")
        values = list(map(value_of, inputs))
        return [place for size, often in self.terms.items() for place in [_place(size, values)] * int(often)]

    def reader(self, inputs: Iterable[Node]) -> Callable[[Sequence[Any]], Any]:
        """What reads the length off the arguments of a call: an integer, or a symbolic one while tracing."""
        places, fixed = self.find(inputs), int(self.fixed)
        return lambda args: sum((args[at] if axis is None else args[at].shape[axis] for at, axis in places), fixed)

    def batch_axis(self, value: Any) -> int | None:
        """The axis that counts sequences, or None where none does, or none alone: sequences are then not told apart."""
        if self.axis(value) == FLAT:
            return 0
        first = value[0] if isinstance(value, list | tuple) else value
        if not isinstance(first, Tensor):
            return None
        sizes = [expression(size) for size in first.shape]
        if self.batch == 1:
            return sizes.index(self.batch) if self.batch in sizes else None
        symbols = self.batch.free_symbols
        depends = [axis for axis, size in enumerate(sizes) if size == self.batch or size.free_symbols & symbols]
        return depends[0] if len(depends) == 1 and sizes[depends[0]] == self.batch else None

    def is_shared(self, value: Any) -> bool:
        """Whether it is one for every sequence, as positions are: (1, ..., token, ...)."""
        if not isinstance(value, Tensor) or value.dim() == 0 or expression(value.shape[0]) != 1:
            return False
        return not any(expression(size).free_symbols & self.batch.free_symbols for size in value.shape)


def _place(size: sympy.Expr, values: Sequence[Any]) -> tuple[int, int | None]:
    """The first of the values that is this size or has an axis of it, and which."""
    for place, value in enumerate(values):
        if isinstance(value, torch.SymInt) and expression(value) == size:
            return place, None
        sizes = list(map(expression, value.shape)) if isinstance(value, Tensor) else []
        if size in sizes:
            return place, sizes.index(size)
    raise ValueError(f"no input of the graph has the length {size}: make the sequence outside of what is compiled")
