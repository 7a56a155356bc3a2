"""Evaluation: metrics, scores over splits with modalities taken away, and scikit-learn baselines."""

from moemm.evaluate.baselines import baseline
from moemm.evaluate.cost import Cost, count_cost
from moemm.evaluate.given import FilePredictions, predict_file
from moemm.evaluate.metrics import METRICS, score
from moemm.evaluate.missing import evaluate_subsets, subsets_csv
from moemm.evaluate.predict import Prediction, Predictor
from moemm.evaluate.prediction_file import check_output, write_predictions
from moemm.evaluate.prediction_table import render_predictions, summarize
from moemm.evaluate.reuse import causal_reuse, loss_of
from moemm.evaluate.run import TrainedRun, evaluate_run, render
from moemm.evaluate.scoring import EvaluationPlan, TaskScore, evaluate_model, scores_to_dict

__all__ = [
    "METRICS",
    "Cost",
    "EvaluationPlan",
    "FilePredictions",
    "Prediction",
    "Predictor",
    "TaskScore",
    "TrainedRun",
    "baseline",
    "causal_reuse",
    "check_output",
    "count_cost",
    "evaluate_model",
    "evaluate_run",
    "evaluate_subsets",
    "loss_of",
    "predict_file",
    "render",
    "render_predictions",
    "score",
    "scores_to_dict",
    "subsets_csv",
    "summarize",
    "write_predictions",
]
