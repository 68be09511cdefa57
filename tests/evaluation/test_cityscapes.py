"""Cityscapes' evaluation with functions that NumPy 2.4 no longer has; cityscapesscripts itself need not be there."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator

from d2_objssl.evaluation.cityscapes import CityscapesLabelEvaluator, CityscapesMaskEvaluator


@pytest.mark.parametrize(
    ("evaluator_class", "base", "script"),
    [
        (CityscapesMaskEvaluator, CityscapesInstanceEvaluator, "evalInstanceLevelSemanticLabeling"),
        (CityscapesLabelEvaluator, CityscapesSemSegEvaluator, "evalPixelLevelSemanticLabeling"),
    ],
)
def test_scripts_run_on_numpy_2_4(evaluator_class, base, script, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = ModuleType(script)
    scripts.np = np
    for name, module in (("cityscapesscripts", ModuleType("c")), ("cityscapesscripts.evaluation", ModuleType("e"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, f"cityscapesscripts.evaluation.{script}", scripts)

    def evaluate(self: object) -> str:
        """What the scripts do, in their words."""
        labels = scripts.np.array([[1, 2], [3, 1]])
        void = scripts.np.in1d(labels, [1]).reshape(labels.shape)
        others = scripts.np.in1d(labels, [1], invert=True).reshape(labels.shape)
        assert void.tolist() == [[True, False], [False, True]] and (others == ~void).all()
        return json.dumps({"pixelCount": scripts.np.count_nonzero(void)})

    monkeypatch.setattr(base, "evaluate", evaluate)
    assert evaluator_class.__new__(evaluator_class).evaluate() == '{"pixelCount": 2}'
    assert scripts.np is np
