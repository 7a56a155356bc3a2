"""Settling conflicts between losses: weights from the Gram matrix of their gradients, and where that comes from."""

from moemm.harmonize import methods as methods
from moemm.harmonize.fork import Fork as Fork
from moemm.harmonize.fork import Readers as Readers
from moemm.harmonize.registry import HARMONIZERS as HARMONIZERS
from moemm.harmonize.registry import Context as Context
from moemm.harmonize.registry import register_harmonizer as register_harmonizer
from moemm.harmonize.scale import SCALES as SCALES
from moemm.harmonize.scale import GradNorm as GradNorm
from moemm.harmonize.scale import LossScale as LossScale
from moemm.harmonize.settler import Conflict as Conflict
from moemm.harmonize.settler import Settler as Settler
from moemm.harmonize.weights import Weights as Weights
from moemm.harmonize.weights import weights as weights
