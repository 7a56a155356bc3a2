"""Analyses of data and trained runs: what modalities have in common, and which of them should share experts."""

from moemm.analyze.cluster import Merge, agglomerate, cut, largest_jump
from moemm.analyze.grouping import largest_number, parameters, regroup
from moemm.analyze.heterogeneity import FILE, FOLDER, Subject, Wanted, analyze_heterogeneity, write_grouped
from moemm.analyze.matrix import Transfer
from moemm.analyze.pvi import Effort, pairs_of, transfer_between
from moemm.analyze.zero_shot import exchange_experts

__all__ = [
    "FILE",
    "FOLDER",
    "Effort",
    "Merge",
    "Subject",
    "Transfer",
    "Wanted",
    "agglomerate",
    "analyze_heterogeneity",
    "cut",
    "exchange_experts",
    "largest_jump",
    "largest_number",
    "pairs_of",
    "parameters",
    "regroup",
    "transfer_between",
    "write_grouped",
]
