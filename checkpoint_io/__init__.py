"""Reading and writing what a checkpoint is made of: tensors, key tables and typed configs.

The leaf of the import graph: both stages and the toolkit use it, it uses none of them. Nothing in here ever
executes code from a file.
"""

from checkpoint_io.config import (
    check_bounds,
    config_from_mapping,
    config_to_mapping,
    flatten_config,
    read_yaml,
    repeated,
)
from checkpoint_io.errors import CheckpointError
from checkpoint_io.hashes import file_hash, tensors_hash
from checkpoint_io.keys import KeyTable, check_finite, load_strict, without_storage
from checkpoint_io.layout import CheckpointPart, Layout, find_parts
from checkpoint_io.tensors import (
    atomic_path,
    leftover_files,
    read_tensors,
    write_safetensors,
)

__all__ = [
    "CheckpointError",
    "CheckpointPart",
    "KeyTable",
    "Layout",
    "atomic_path",
    "check_bounds",
    "check_finite",
    "config_from_mapping",
    "config_to_mapping",
    "file_hash",
    "find_parts",
    "flatten_config",
    "leftover_files",
    "load_strict",
    "read_tensors",
    "read_yaml",
    "repeated",
    "tensors_hash",
    "without_storage",
    "write_safetensors",
]
