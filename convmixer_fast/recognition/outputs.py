"""Results that are dataclasses, which ``torch.export`` does not know.

They are traced as dictionaries, under names that no model uses, and made again by what runs the
source's head.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from convmixer_fast.models.outputs import with_dictionaries

__all__ = ["WRAPPED", "PlainOutputs", "WithDataclasses"]

WRAPPED = "source_of_dataclasses"
"""What the name of every module begins with in the graph of :class:`PlainOutputs`."""
_MARK = "convmixer_fast.dataclass."


class _Seen:
    """Outside of the module, whose attributes torch.export puts back."""

    types: list[type]


class PlainOutputs(nn.Module):
    """A module that returns dictionaries where ``model`` returns dataclasses.

    ``seen.types`` are those of the last call, by their number in the dictionaries' names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(WRAPPED, model)
        self.seen = _Seen()
        self.train(model.training)

    def forward(self, x: Tensor) -> Any:
        """Call the model."""
        self.seen.types = []
        return with_dictionaries(getattr(self, WRAPPED)(x), self._marked)

    def _marked(self, value: Any, fields: dict[str, Any]) -> dict[str, Any]:
        self.seen.types.append(type(value))
        return {f"{_MARK}{len(self.seen.types) - 1}": fields}


class WithDataclasses(nn.Module):
    """A head of :class:`PlainOutputs` that returns what the source's own does."""

    def __init__(self, head: nn.Module, types: Sequence[type]) -> None:
        super().__init__()
        self.head, self.types = head, tuple(types)

    def forward(self, *inputs: Tensor) -> Any:
        """Call the head."""
        return self._made(self.head(*inputs))

    def _made(self, value: Any) -> Any:
        if type(value) is dict:
            made = {key: self._made(inner) for key, inner in value.items()}
            name = next(iter(made), "")
            if isinstance(name, str) and name.startswith(_MARK):
                return self.types[int(name.removeprefix(_MARK))](**made[name])
            return made
        return type(value)(map(self._made, value)) if type(value) in (list, tuple) else value
