"""How good a conversion is: metrics, comparison, history and report.

from auto_voice.evaluation import evaluate, load_judges, read_pairs
result = evaluate(read_pairs("conversions/"), load_judges(ModelRegistry()), name="mine")
result.estimates["secs2"].value
"""

from auto_voice.evaluation.comparison import Comparison, compare
from auto_voice.evaluation.judges import Judges, load_judges
from auto_voice.evaluation.pairs import Pair, read_pairs, read_test_set
from auto_voice.evaluation.results import (
    METRICS,
    Estimate,
    Evaluation,
    PairScore,
    load_evaluation,
    save_evaluation,
)
from auto_voice.evaluation.scoring import Scorer, evaluate

__all__ = [
    "METRICS",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Judges",
    "Pair",
    "PairScore",
    "Scorer",
    "compare",
    "evaluate",
    "load_evaluation",
    "load_judges",
    "read_pairs",
    "read_test_set",
    "save_evaluation",
]
