"""Linear support vector machines on frozen features: which classes are in an image?

    n  images    D  length of a feature    C  classes

Protocol: CYBORGS, Table 1, "VOC07 clf.", which is that of VirTex (Desai and Johnson, CVPR 2021) and of the benchmark of Goyal
et al. (ICCV 2019). For each class a LinearSVC with squared hinge loss and twice the weight on images that have the class; its
cost is the one of `COSTS` with the highest average precision (AP) in 3-fold cross-validation on the training images, the
smallest of equals. AP is scikit-learn's, the area below the precision-recall curve without interpolation, as in VirTex; VOC's
own AP of 2007 (11 points) is another number.

Labels, as in VOC's ImageSets/Main/CLASS_SPLIT.txt: PRESENT, ABSENT, or DIFFICULT where all objects of the class are marked
"difficult". For a class, its difficult images count as absent in training (as in VirTex) and are left out in the test.

Deviations: VirTex solves the dual problem, whose solver stops at `MAX_ITER` before it has converged; here scikit-learn solves
the primal one where there are more images than dimensions. A class that cannot be learned or tested, see `why_left_out`, is
left out of the mean, with a warning; in VOC07 there is none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from ..data.voc_datasets import read_annotation

logger = logging.getLogger(__name__)

PRESENT, DIFFICULT, ABSENT = 1, 0, -1
COSTS = (0.01, 0.1, 1.0, 10.0)
NUM_FOLDS = 3
MAX_ITER = 2000


class ClassResult(NamedTuple):
    """How well a class is recognised.

    Attributes:
        ap: average precision on the test images, in [0, 1].
        cross_validation_ap: mean over the folds of the training images, with the cost that was chosen.
        cost: C of the support vector machine.
        train_share, test_share: of the images that count, those that have the class. The latter is also the AP that a
            random order of the images is expected to have.
    """

    ap: float
    cross_validation_ap: float
    cost: float
    train_share: float
    test_share: float


def presence_labels(
    dataset_dicts: Sequence[dict[str, Any]], dataset_name: str, class_names: Sequence[str]
) -> np.ndarray:
    """Tell which classes are in which images.

    Args:
        dataset_dicts: with "label", or objects: those of the XML file in a data set of VOC's layout (metadata
            `dirname`), which tells the difficult ones, otherwise "annotations", crowds included.
        dataset_name: in the catalogs.
        class_names: C names, in the order of the category ids.

    Returns:
        (n, C) int8 of PRESENT, DIFFICULT and ABSENT.

    Raises:
        ValueError: if an image has no labels.
    """
    root = MetadataCatalog.get(dataset_name).get("dirname", None)
    labels = np.full((len(dataset_dicts), len(class_names)), ABSENT, dtype=np.int8)
    for row, dataset_dict in zip(labels, dataset_dicts, strict=True):
        for category, difficult in _objects(dataset_dict, root, dataset_name, class_names):
            row[category] = max(row[category], DIFFICULT if difficult else PRESENT)
    return labels


def _objects(
    dataset_dict: dict[str, Any], voc_root: str | None, dataset_name: str, class_names: Sequence[str]
) -> Iterator[tuple[int, bool]]:
    """(category id, difficult) of everything that is labelled in an image."""
    if "label" in dataset_dict:
        yield dataset_dict["label"], False
    elif voc_root is not None:
        for obj in read_annotation(os.path.join(voc_root, "Annotations", f"{dataset_dict['image_id']}.xml")).objects:
            yield class_names.index(obj.name), obj.difficult
    elif "annotations" in dataset_dict:
        for annotation in dataset_dict["annotations"]:
            yield annotation["category_id"], False
    else:
        raise ValueError(f'"{dataset_name}" has no class labels and no objects: {dataset_dict["file_name"]}')


def why_left_out(train_labels: np.ndarray, test_labels: np.ndarray) -> str:
    """Why a class cannot be learned or tested; "" if it can.

    Args:
        train_labels, test_labels: (n,) int8, of one class.
    """
    num_present, num_absent = (train_labels == PRESENT).sum(), (train_labels != PRESENT).sum()
    if min(num_present, num_absent) < NUM_FOLDS:
        return (
            f"{num_present} training images have it and {num_absent} do not, but {NUM_FOLDS}-fold cross-validation needs "
            f"{NUM_FOLDS} of each"
        )
    return "" if (test_labels == PRESENT).any() else "no test image has it"


def evaluate_class(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_jobs: int = 1,
) -> ClassResult:
    """Train the support vector machine of one class, and test it.

    Args:
        train_features, test_features: (n, D) float32.
        train_labels, test_labels: (n,) int8, for which `why_left_out` finds nothing.
        num_jobs: processes of the cross-validation.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    sklearn = import_sklearn()
    targets = np.where(train_labels == PRESENT, 1, -1)
    svm = sklearn.svm.LinearSVC(class_weight={1: 2, -1: 1}, max_iter=MAX_ITER, dual="auto", random_state=0)
    search = sklearn.model_selection.GridSearchCV(
        svm, {"C": COSTS}, scoring="average_precision", cv=NUM_FOLDS, n_jobs=num_jobs
    )
    search.fit(train_features, targets)
    counted = test_labels != DIFFICULT
    is_present = test_labels[counted] == PRESENT
    scores = search.decision_function(test_features[counted])
    return ClassResult(
        ap=float(sklearn.metrics.average_precision_score(is_present, scores)),
        cross_validation_ap=float(search.best_score_),
        cost=float(search.best_params_["C"]),
        train_share=float((targets == 1).mean()),
        test_share=float(is_present.mean()),
    )


def evaluate_classes(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    class_names: Sequence[str],
    *,
    num_jobs: int = 1,
) -> dict[str, ClassResult]:
    """Results of `evaluate_class` for all classes, by name; those that are left out are named in a warning.

    Args:
        train_features, test_features: (n, D) float32.
        train_labels, test_labels: (n, C) int8, see `presence_labels`.
        class_names: C names.
        num_jobs: processes of the cross-validation.

    Raises:
        ValueError: if no class can be learned and tested.
    """
    results, left_out = {}, []
    for c, name in enumerate(tqdm(class_names, desc="support vector machines", unit="class")):
        if reason := why_left_out(train_labels[:, c], test_labels[:, c]):
            left_out.append(f"{name}: {reason}")
            continue
        results[name] = evaluate_class(
            train_features, train_labels[:, c], test_features, test_labels[:, c], num_jobs=num_jobs
        )
    if not results:
        raise ValueError("no class can be learned and tested:\n  " + "\n  ".join(left_out))
    if left_out:
        logger.warning("Left out of the mean:\n  %s", "\n  ".join(left_out))
    return results


def import_sklearn() -> Any:
    try:
        import sklearn.metrics
        import sklearn.model_selection
        import sklearn.svm
    except ImportError as error:
        raise ImportError('Support vector machines need scikit-learn: pip install "d2_objssl[probes]"') from error
    return sklearn
