"""Repositories on the Hub as checkpoints."""

from slrmerge.errors import require_hub_settings

require_hub_settings()  # the client reads them when it is imported
