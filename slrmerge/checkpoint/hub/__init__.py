"""Repositories on the Hub as checkpoints.

Raises HubError when it is imported where the Hub's client could not be: the client reads its settings then.
"""

from slrmerge.errors import require_hub_settings

require_hub_settings()
