"""Ranks: where a process stands among the others, and what they say to each other."""

from moemm.distributed.collectives import (
    agree,
    broadcast_object,
    gather_objects,
    gather_rows,
    last_collective,
    max_over_ranks,
    note_collective,
    num_ranks,
    on_main,
    sum_over_ranks,
)
from moemm.distributed.environment import World, connect, disconnect, prepare_environment
from moemm.distributed.groups import ExpertGroups, expert_groups
from moemm.distributed.places import on_board
from moemm.distributed.threads import choose_cpu_threads

__all__ = [
    "ExpertGroups",
    "World",
    "agree",
    "broadcast_object",
    "choose_cpu_threads",
    "connect",
    "disconnect",
    "expert_groups",
    "gather_objects",
    "gather_rows",
    "last_collective",
    "max_over_ranks",
    "note_collective",
    "num_ranks",
    "on_board",
    "on_main",
    "prepare_environment",
    "sum_over_ranks",
]
