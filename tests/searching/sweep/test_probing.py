"""What passes with made-up weights find: whether each row of a head gives its logit alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from tests.searching.sweep.models import VOCABULARY, staged

HEADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "depends on the other rows": lambda logits: logits - logits.mean(dim=-1, keepdim=True),
    "adds something of the vocabulary's size": lambda logits: logits + torch.zeros(VOCABULARY),
    "gives more logits than it has rows": lambda logits: torch.cat([logits, logits[..., :1]], dim=-1),
}


@pytest.mark.parametrize("change", HEADS.values(), ids=HEADS)
def test_a_head_whose_rows_do_not_stand_alone_is_loaded_whole(
    llamas: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    embedding, head = staged(llamas / "post").by_row
    forward = modeling_llama.LlamaForCausalLM.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", changed)
    assert head == ("lm_head.weight",)
    assert staged(llamas / "post").by_row == (embedding, ())
