"""The table of what absent keys of configs mean: as transformers has it; renewed with UPDATE_GOLDEN=1."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint import config_defaults
from slrmerge.checkpoint.config_differences import _INCIDENTAL, _ROPE_KEYS

TABLE = Path(config_defaults.__file__).with_suffix(".json")
PLAIN = (bool, int, float, str, type(None))


def made() -> dict[str, Any]:
    """The defaults of every language model's config, and of the text part of every other, without incidental keys."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = [
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    ]
    wanted = {name for names in named for name in names}
    types: dict[str, Any] = {}
    for name in sorted(CONFIG_MAPPING):
        if name not in wanted and "text" not in name:
            continue
        fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[name])}
        kept = {
            key: value for key, value in fields.items() if not _INCIDENTAL.fullmatch(key) and isinstance(value, PLAIN)
        }
        kept = {key: value for key, value in kept.items() if key not in _ROPE_KEYS}
        if "rope_parameters" in fields and (rope := CONFIG_MAPPING[name]().rope_parameters):
            kept["rope_parameters"] = rope
        types[name] = kept | ({"tie_word_embeddings": True} if fields.get("tie_word_embeddings") else {})
    return {"transformers": transformers.__version__, "types": types}


def test_the_table_is_what_transformers_has() -> None:
    import transformers

    table = json.loads(TABLE.read_bytes())
    if os.environ.get("UPDATE_GOLDEN"):
        lines = [f"{json.dumps(name)}: {json.dumps(each, sort_keys=True)}" for name, each in made()["types"].items()]
        version = json.dumps(transformers.__version__)
        TABLE.write_text('{"transformers": ' + version + ', "types": {\n' + ",\n".join(lines) + "\n}}\n")
    elif table["transformers"] != transformers.__version__:
        pytest.skip(f"the table is that of transformers {table['transformers']}")
    else:
        assert table == json.loads(json.dumps(made()))
