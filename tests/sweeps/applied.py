"""The class of the models that operators.py converts: one operator, with the constants of one sample."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

INPUT = object()  # stands where an input goes
# By key: the operator, its arguments as the leaves of a tree, and that tree.
CALLS: dict[str, tuple[Callable[..., Any], Sequence[Any], TreeSpec]] = {}


class Operator(nn.Module):
    """Applies CALLS[key] to its inputs; a pickle of it holds no more than the key."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, *inputs: Tensor) -> Any:
        """The tensors that the operator returns."""
        function, leaves, tree = CALLS[self.key]
        given = iter(inputs)
        first, args, kwargs = tree_unflatten([next(given) if leaf is INPUT else leaf for leaf in leaves], tree)
        result = [leaf for leaf in tree_leaves(function(first, *args, **kwargs)) if isinstance(leaf, Tensor)]
        return result[0] if len(result) == 1 else tuple(result)
