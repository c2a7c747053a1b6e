"""What an absent key of a config means, by model type: the defaults of transformers' config classes, as a table.

The table is made by tests/checkpoint/test_config_defaults.py, which compares it with the installed transformers.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def config_defaults() -> Mapping[str, Mapping[str, Any]]:
    """The defaults of each known model type: those that change what a layer computes, and the tie of the embeddings."""
    return dict(json.loads(Path(__file__).with_suffix(".json").read_bytes())["types"])
