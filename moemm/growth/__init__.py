"""Models that grow: each operation reads a run, writes another beside it, and proves what it says in a receipt."""

from moemm.growth.grown import Base, read_base, write_grown
from moemm.growth.merging import merge
from moemm.growth.receipt import Proof, Receipt, Size, read_receipt

__all__ = ["Base", "Proof", "Receipt", "Size", "merge", "read_base", "read_receipt", "write_grown"]
