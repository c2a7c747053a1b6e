"""A checkpoint on disk: its headers, its config, and its bytes on request.

Opening one reads headers only; `CheckpointReader` reads tensors, in pieces, and notices when a file changes under it.
"""

from slrmerge.checkpoint.folder import (
    CHAT_TEMPLATE_FOLDERS,
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    open_folder,
)
from slrmerge.checkpoint.header import (
    DTYPE_BITS,
    FLOATING,
    Identity,
    Shard,
    TensorInfo,
    header_bytes,
    open_regular,
    read_shard,
)
from slrmerge.checkpoint.layers import LayerStack, layer_count
from slrmerge.checkpoint.quantised import quantisation_config, quantised_groups
from slrmerge.checkpoint.reader import CheckpointReader, Extent
from slrmerge.checkpoint.remote import RemoteFile, Snapshot, waiting_threads

__all__ = [
    "CHAT_TEMPLATE_FOLDERS",
    "CONFIG_NAME",
    "DTYPE_BITS",
    "FLOATING",
    "INDEX_NAME",
    "SINGLE_NAME",
    "Checkpoint",
    "CheckpointReader",
    "Extent",
    "Identity",
    "LayerStack",
    "RemoteFile",
    "Shard",
    "Snapshot",
    "TensorInfo",
    "header_bytes",
    "layer_count",
    "open_folder",
    "open_regular",
    "quantisation_config",
    "quantised_groups",
    "read_shard",
    "waiting_threads",
]
