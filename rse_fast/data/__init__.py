"""Image data sets as uint8 tensors: handwritten digits, image folders, CIFAR-10, STL-10, arrays; and batches of them.

Images stay uint8 until a batch is made; a batch is float32 in [0, 1] and is *not* normalised (see ``rse_fast.models``). Only torch and
numpy are needed to import this package; what reads a format (scikit-learn, Pillow, safetensors) and tqdm are imported when called.
"""

from rse_fast.data.batches import augment, batches, derived_seed, shuffled
from rse_fast.data.files import (
    append,
    check_writable,
    claim,
    open_regular,
    read_bytes,
    read_json,
    remove_leftovers,
    sync_folder,
    write_atomically,
    write_through,
)
from rse_fast.data.folder import FilePart, image_folder
from rse_fast.data.parts import Part, Splits
from rse_fast.data.releases import arrays, cifar10, digits, load, stl10

__all__ = [
    "FilePart", "Part", "Splits", "append", "arrays", "augment", "batches", "check_writable", "cifar10", "claim", "derived_seed", "digits",
    "image_folder", "load", "open_regular", "read_bytes", "read_json", "remove_leftovers", "shuffled", "stl10", "sync_folder",
    "write_atomically", "write_through",
]  # fmt: skip
