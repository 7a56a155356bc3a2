"""Start `moemm train` on several ranks: a SLURM job, or processes of this machine or of a hostfile. Imports no torch.

What is started are the scripts in templates/, which launchers/ of the source folder shows.
"""

from moemm.launch.hostfile import read_hostfile
from moemm.launch.slurm import SlurmJob, slurm_script, submit
from moemm.launch.start import LAUNCHERS, Start, plan_start, start
from moemm.launch.sweep import Point, sweep

__all__ = [
    "LAUNCHERS",
    "Point",
    "SlurmJob",
    "Start",
    "plan_start",
    "read_hostfile",
    "slurm_script",
    "start",
    "submit",
    "sweep",
]
