"""The schema of recipes as the package contains it."""

import json
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]

import slrmerge

SCHEMA = json.loads((Path(slrmerge.__file__).parent / "recipe" / "recipe.schema.json").read_text("utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
