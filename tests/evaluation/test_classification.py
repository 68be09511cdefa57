"""Top-1 and top-5 accuracy of logits made by hand, in one process and in two with shards of different sizes."""

import math

import pytest
import torch
from multiprocess import run_in_processes

from d2_objssl.evaluation.classification import ClassificationEvaluator, rank_of_label

# (label, scores of 7 classes): the label's rank is 0, 0, 1, 4, 5, 6 -> top-1 2 of 6, top-5 4 of 6
IMAGES = [
    (0, [9, 1, 2, 3, 4, 5, 6]),
    (6, [-9, -8, -7, -6, -5, -4, -3]),
    (3, [0, 0, 0, 5, 0, 6, 0]),
    (2, [5, 6, 4, 7, 8, 1, 0]),
    (1, [5, 0.5, 4, 7, 8, 1, 0]),
    (1, [5, -0.5, 4, 7, 8, 1, 0]),
]
EXPECTED = {"top1": 100 * 2 / 6, "top5": 100 * 4 / 6}


def evaluate(indices: list[int]) -> dict:
    evaluator = ClassificationEvaluator()
    evaluator.reset()
    for i in indices:
        label, scores = IMAGES[i]
        scores = torch.tensor(scores, dtype=torch.float32)
        evaluator.process([{"image_id": i, "label": label}], [{"scores": scores}])
    return evaluator.evaluate()


def evaluate_shard(shards: list[list[int]]) -> dict:
    return evaluate(shards[torch.distributed.get_rank()])


def test_accuracy():
    assert evaluate(list(range(6))) == {"classification": EXPECTED}


@pytest.mark.parametrize("shards", [[[0, 1, 2, 3, 4], [5]], [[0, 1, 2, 3, 4, 5], []]])
def test_two_processes_equal_one(shards):
    assert run_in_processes(evaluate_shard, shards) == [{"classification": EXPECTED}, {}]


def test_an_image_that_two_processes_had_counts_once():
    assert run_in_processes(evaluate_shard, [[0, 1, 2, 3], [4, 5, 0, 1]]) == [{"classification": EXPECTED}, {}]


def test_a_model_that_says_the_same_of_all_classes_or_nan_is_never_right():
    assert rank_of_label(torch.zeros(7), 0) == 6
    assert rank_of_label(torch.full((7,), math.nan), 0) == 6
    assert rank_of_label(torch.tensor([1.0, math.nan, 0.0]), 0) == 1


def test_without_images_there_is_no_accuracy():
    with pytest.raises(ValueError, match=r"DATASETS\.TEST has no image"):
        evaluate([])
