"""Metrics of classification, against scikit-learn's."""

import pytest
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef

from pemn_surgery.errors import RecipeError
from pemn_surgery.recipe.classification import METRICS, Classification

ROWS = torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_metrics_are_scikit_learns(classes):
    made = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (50,), generator=made)
    wrong = torch.rand(50, generator=made) < 0.4
    predicted = torch.where(wrong, torch.randint(classes, (50,), generator=made), labels)
    for name, oracle in (("accuracy", accuracy_score), ("matthews", matthews_corrcoef)):
        assert METRICS[name](predicted, labels) == pytest.approx(100 * oracle(labels, predicted))
    assert METRICS["matthews"](torch.zeros_like(labels), labels) == 0


def test_a_task_is_measured_by_its_metric():
    """More rows than are tested at once; logits that say class 1 where the input is 1."""
    inputs = torch.tensor([[0.0], [1.0], [1.0]] * 400)
    labels = torch.tensor([0, 1, 0] * 400)
    for name, metric in METRICS.items():
        task = Classification(ROWS, (inputs, labels), metric=name)
        found = task.accuracy(lambda x: torch.cat([1 - x, x], 1))
        assert found == pytest.approx(metric(inputs[:, 0].long(), labels))
    with pytest.raises(RecipeError, match="metric 'taste' is unknown"):
        Classification(ROWS, ROWS, metric="taste")
