"""Models that grow: each operation reads a run, writes another beside it, and proves what it says in a receipt."""

from moemm.growth import extend
from moemm.growth.grown import Base, read_base, write_grown
from moemm.growth.merging import merge
from moemm.growth.package import export_extension, load_extension
from moemm.growth.receipt import Proof, Receipt, Size, read_receipt
from moemm.growth.upcycling import Wanted, upcycle

__all__ = [
    "Base",
    "Proof",
    "Receipt",
    "Size",
    "Wanted",
    "export_extension",
    "extend",
    "load_extension",
    "merge",
    "read_base",
    "read_receipt",
    "upcycle",
    "write_grown",
]
