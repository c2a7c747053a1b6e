"""An embedding of which only the rows in use are in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def rows_in_use(token_ids: Iterable[int]) -> list[int]:
    """The rows of the embedding that these tokens need, in order."""
    return sorted(set(token_ids))


class EmbeddingRows(TorchFunctionMode):
    """Look-ups in `rows`, in a `with`, go by token id: row r has the embedding of token `token_ids[r]`."""

    def __init__(self, rows: torch.Tensor, token_ids: Sequence[int]) -> None:
        super().__init__()
        self._rows = rows
        self._place = torch.zeros(max(token_ids) + 1, dtype=torch.long, device=rows.device)
        self._place[torch.tensor(token_ids, device=rows.device)] = torch.arange(len(token_ids), device=rows.device)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.nn.functional.embedding and len(args) > 1 and args[1] is self._rows:
            return function(self._place[args[0]], self._rows)
        return function(*args, **(kwargs or {}))
