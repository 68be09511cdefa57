"""benchmarks/speed.py: the plain ways compute what ours do, so that times can be compared."""

import copy
import json
from functools import partial

import pytest
import speed
import torch
from stages import STAGES
from stages.losses import gathered_slots, make_regions, make_slots, published_detcon, published_slots
from stages.plain_updates import PlainLARS, move_plainly, teacher_hook
from stages.step import ConvMLP
from stages.timing import Measurement, Row, format_rows
from torch import nn

from d2_objssl.engine import LARS
from d2_objssl.modeling.heads import MLP
from d2_objssl.modeling.methods.detcon import detcon_nce

pytestmark = pytest.mark.usefixtures("keep_threads")


def gradients(loss, leaf):
    leaf.grad = None
    loss().backward()
    return leaf.grad.clone()


def test_published_losses_equal_ours():
    inputs = make_regions(6, 6, seed=0)
    pair = partial(published_detcon, **inputs), partial(detcon_nce, *inputs.values())
    torch.testing.assert_close(*(gradients(loss, inputs["pred1"]) for loss in pair))
    inputs = make_slots(4, 16, seed=0)
    pair = partial(published_slots, **inputs), partial(gathered_slots, **inputs)
    torch.testing.assert_close(*(gradients(loss, inputs["queries"]) for loss in pair))


def test_loops_over_parameters_equal_ours():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    twin = copy.deepcopy(student)
    plain, ours = PlainLARS(list(student.parameters())), LARS(twin.parameters(), lr=0.1, weight_decay=1e-5)
    for _ in range(3):
        for p, q in zip(student.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        plain.step()
        ours.step()
    torch.testing.assert_close(list(student.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-7)
    other = copy.deepcopy(teacher)
    move_plainly(teacher, student)
    teacher_hook(other, student)()
    torch.testing.assert_close(list(teacher.parameters()), list(other.parameters()))


def test_projector_of_convolutions_equals_ours():
    torch.manual_seed(0)
    mlp = MLP(8, num_fc=3, fc_dim=6, out_dim=4, norm="BN").train()
    x = torch.randn(2, 3, 3, 8)
    convolutions = ConvMLP(copy.deepcopy(mlp)).train()
    torch.testing.assert_close(convolutions(x), mlp(x))


def test_record_and_bad_arguments(tmp_path, monkeypatch, capsys):
    """The record has the table and what the stage found; a folder without images is named."""
    assert Row("views", 6.0, 2.0, unit="ms").ratio == 3
    assert "3.00x" in format_rows([Row("views", 6.0, 2.0, unit="ms", goal=2.5)])
    chosen = {name: STAGES[name] for name in ("masks",)}
    monkeypatch.setattr(speed, "STAGES", chosen)
    with pytest.raises(SystemExit, match=r"--images .*: no \*\.jpg there"):
        speed.main(["masks", "--images", str(tmp_path)])
    monkeypatch.setattr(
        chosen["masks"], "run", lambda args: Measurement([Row("x", 2.0, 1.0, "s")], {"repeats": args.repeats})
    )
    speed.main(["masks", "--repeats", "7", "--output", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["table"][0]["ratio"] == 2 and record["details"] == {"masks": {"repeats": 7}}
    assert "2.00x" in capsys.readouterr().out
