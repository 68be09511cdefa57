"""Records of runs."""

import json

import torch

from d2_objssl.evaluation.results import environment, write_record


def test_record_holds_what_made_it(tmp_path):
    path = tmp_path / "new" / "record.json"
    write_record(path, {"task": "t", "seeds": [0]})
    record = json.loads(path.read_text())
    assert record["task"] == "t" and record["seeds"] == [0]
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert {"python", "detectron2", "d2_objssl", "opencv"} <= record["versions"].keys()
    assert record["command"] and record["hardware"]["num_cpus"] >= 1
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_environment_is_plain():
    assert json.loads(json.dumps(environment())) == environment()
