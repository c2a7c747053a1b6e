"""Every config and recipe in the documentation is one."""

import re
from pathlib import Path

import pytest
import yaml

from slrmerge.mergekit import is_config
from slrmerge.mergekit.read import read_config
from slrmerge.recipe import parse_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "mergekit.md").read_text()
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", BLOCKS)
def test_every_block_is_read(text: str) -> None:
    content = yaml.safe_load(text)
    assert text.startswith("# mergekit" if is_config(content) else "# slrmerge")
    if is_config(content):
        sides, _ = read_config(content, "docs")
        assert parse_recipe(sides, pair_only=True).sources()
    else:
        assert parse_recipe(content).has_rules


def test_the_page_shows_the_methods_that_are_read() -> None:
    shown = {content["merge_method"] for content in map(yaml.safe_load, BLOCKS) if is_config(content)}
    assert shown == {"passthrough", "linear", "slerp"}
