"""Analyses of data and trained runs: which modalities are alike, where losses conflict, who should share experts."""

from moemm.analyze.cluster import Merge, agglomerate, cut, largest_jump
from moemm.analyze.conflict import Pick, Sampling, analyze_conflict, decide, write_split
from moemm.analyze.gradients import Part, cosines, products, tapped
from moemm.analyze.grouping import largest_number, parameters, regroup
from moemm.analyze.heterogeneity import FILE, FOLDER, Subject, Wanted, analyze_heterogeneity, write_grouped
from moemm.analyze.matrix import Transfer
from moemm.analyze.pvi import Effort, pairs_of, transfer_between
from moemm.analyze.split import Split, lasting, propose, separate
from moemm.analyze.zero_shot import exchange_experts

__all__ = [
    "FILE",
    "FOLDER",
    "Effort",
    "Merge",
    "Part",
    "Pick",
    "Sampling",
    "Split",
    "Subject",
    "Transfer",
    "Wanted",
    "agglomerate",
    "analyze_conflict",
    "analyze_heterogeneity",
    "cosines",
    "cut",
    "decide",
    "exchange_experts",
    "largest_jump",
    "largest_number",
    "lasting",
    "pairs_of",
    "parameters",
    "products",
    "propose",
    "regroup",
    "separate",
    "tapped",
    "transfer_between",
    "write_grouped",
    "write_split",
]
