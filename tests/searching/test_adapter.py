"""Searches whose post-trained side is a LoRA adapter: what is scored is the model that it makes of its base."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest

from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.errors import UnsupportedModelError
from slrmerge.merging.executor import merge
from slrmerge.recipe.load import load_recipe
from tests.adapters import PREFIX, lora_tensors, write_adapter
from tests.checkpoints import Tensor, random_tensor
from tests.problems import refused
from tests.searching.pairs import LAYERS, TEMPLATE, SmallPair, scores_of_paths

pytestmark = pytest.mark.usefixtures("hurried")

TOLERANCE = 1e-5
MODULES = [f"model.layers.{number}.{name}" for number in range(LAYERS) for name in ("self_attn.q_proj", "mlp.up_proj")]


def with_adapter(pair: SmallPair, more: Mapping[str, Tensor] | None = None, **options: Any) -> SmallPair:
    """The pair with an adapter on its pre-trained side, which gets a chat template, as its post-trained one."""
    base = {name: Tensor("F32", info.shape, b"") for name, info in open_checkpoint(pair.folder / "pre").items()}
    (pair.folder / "post").rename(pair.folder / "other")
    tensors = {**lora_tensors(base, MODULES), **(more or {})}
    write_adapter(pair.folder / "post", tensors, base_model_name_or_path=str(pair.folder / "pre"), **options)
    return pair


def assert_scored_as_merged(pair: SmallPair, *labels: str) -> None:
    """The scores of these candidates are those of the merged checkpoints in transformers."""
    search = pair.search()
    result = search.run(pair.out)
    rows = {row.label: row for row in result.rows}
    found = []
    for number, label in enumerate(labels):
        folder = merge(result.choice.recipe_for(rows[label]), pair.folder / f"hybrid-{number}", fsync=False).folder
        scores = [scores_of_paths(folder, prompt) for prompt in search.prepared.prompts]
        quality, diversity = (sum(values) / len(scores) for values in zip(*scores, strict=True))
        assert rows[label].quality == pytest.approx(quality, abs=TOLERANCE)
        assert rows[label].diversity == pytest.approx(diversity, abs=TOLERANCE)
        found.append(quality)
    assert all(abs(one - other) > 10 * TOLERANCE for one, other in pairwise(found))


def test_an_adapter_is_searched_and_the_choice_merges(small: SmallPair) -> None:
    assert_scored_as_merged(with_adapter(small), "post-trained", "layers 1–2", "soup 0.50")
    recipe = load_recipe(small.out / "slr.yaml")
    assert recipe.open_pair().posttrained.computed


def test_an_adapter_with_more_words_is_searched(small: SmallPair) -> None:
    """The config is that of the adapter's model: its vocabulary is larger than the base's."""
    rows, width = open_checkpoint(small.folder / "pre")["lm_head.weight"].shape
    names = ("model.embed_tokens", "lm_head")
    more = {f"{PREFIX}{name}.weight": random_tensor("F32", (rows + 2, width), name) for name in names}
    with_adapter(small, more, modules_to_save=["embed_tokens", "lm_head"])
    assert_scored_as_merged(small, "post-trained", "layers 1–2")


def test_the_chat_template_of_an_adapter_is_used(small: SmallPair) -> None:
    with_adapter(small)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (small.folder / "post" / name).write_bytes((small.folder / "pre" / name).read_bytes())
    (small.folder / "post" / "chat_template.jinja").write_text("Chat: " + TEMPLATE)
    assert small.search().prepared.prompts[0].text.startswith("Chat: ")


def test_an_adapter_on_a_base_without_a_chat_template_is_refused(small: SmallPair) -> None:
    with_adapter(small)
    (small.folder / "pre" / "chat_template.jinja").unlink()
    with refused(UnsupportedModelError, "no-chat-template"):
        small.run()
    assert not small.out.exists()
