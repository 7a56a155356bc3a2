"""Evaluation: metrics, scores over splits with modalities taken away, and scikit-learn baselines."""

from moemm.evaluate.baselines import baseline
from moemm.evaluate.cost import Cost, count_cost
from moemm.evaluate.metrics import METRICS, score
from moemm.evaluate.missing import evaluate_subsets, subsets_csv
from moemm.evaluate.predict import Prediction, Predictor
from moemm.evaluate.reuse import causal_reuse, loss_of
from moemm.evaluate.run import TrainedRun, evaluate_run, render
from moemm.evaluate.scoring import EvaluationPlan, TaskScore, evaluate_model, scores_to_dict

__all__ = [
    "METRICS",
    "Cost",
    "EvaluationPlan",
    "Prediction",
    "Predictor",
    "TaskScore",
    "TrainedRun",
    "baseline",
    "causal_reuse",
    "count_cost",
    "evaluate_model",
    "evaluate_run",
    "evaluate_subsets",
    "loss_of",
    "render",
    "score",
    "scores_to_dict",
    "subsets_csv",
]
