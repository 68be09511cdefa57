"""benchmarks/growth.py: every point is recorded and drawn, and what holds on any machine."""

import json

import growth
import matplotlib.image
import pytest
import torch
import torch.distributed as dist
from growth_parts import Sizes
from growth_processes import Traffic
from growth_steps import Heads, Step, step_batch

pytestmark = pytest.mark.usefixtures("keep_threads")
DIM = 16
TINY = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "INPUT.SSL.CROP_SIZE", 64]
TINY += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.SSL.DETCON.NUM_REGIONS", 4]
for head in ("PROJECTOR", "PREDICTOR"):
    TINY += [f"MODEL.SSL.{head}.FC_DIM", 32, f"MODEL.SSL.{head}.OUT_DIM", DIM]
SIZES = Sizes(batch_sizes=(2, 3), prototypes=(8, 16), regions=(1, 4), batch_size=2, repeats=1, opts=TINY)


def test_every_number_of_prototypes_is_recorded_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "_QUICK", SIZES)
    file, figure = tmp_path / "growth.json", tmp_path / "growth.png"
    growth.main(["--parts", "prototypes", "--quick", "--output", str(file), *(str(word) for word in TINY)])
    assert "SlotCon, ResNet-50, 64 px, batch 2, bfloat16" in capsys.readouterr().out
    small, large = json.loads(file.read_text())["prototypes"]["points"]
    assert (small["prototypes"], large["prototypes"]) == (8, 16)
    # Of 64 pixels res5 has 2 x 2 cells.
    assert small["tensors_mb"] == pytest.approx({"scores (N, K, h, w)": 256e-6, "slots (N, K, D)": 1024e-6})
    assert large["tensors_mb"] == pytest.approx({name: 2 * mb for name, mb in small["tensors_mb"].items()})
    for point in (small, large):
        assert point["step"]["cpu_s"] > 0 and point["heads"]["cpu_s"] > 0 and point["operators"]
        assert len(point["pieces"]) == 5 and all(seconds > 0 for seconds in point["pieces"].values())
    growth.main(["--draw", str(file), "--figure", str(figure)])
    height, width = matplotlib.image.imread(figure).shape[:2]
    assert width > 2 * height > 500  # time and memory, side by side


def test_record_of_another_task_is_not_drawn(tmp_path):
    file = tmp_path / "speed.json"
    file.write_text('{"task": "speed"}')
    with pytest.raises(SystemExit, match=r'speed.json is a record of the task "speed"'):
        growth.main(["--draw", str(file), "--figure", str(tmp_path / "growth.png")])


def test_heads_on_stored_features_have_the_losses_of_the_whole_model_and_a_step_leaves_the_weights():
    step = Step(SIZES.cfg("SlotCon", 64, "SOLVER.AMP.ENABLED", False), seed=0)
    model, batch = step.model, step_batch(step.cfg, 3, seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-6, atol=1e-7, msg=name)

    def losses():
        model.criterion.center.zero_()
        return {name: loss.item() for name, loss in model(batch).items()}

    whole = losses()
    heads = Heads(step, batch)
    assert losses() == pytest.approx(whole, rel=1e-5)
    heads.free_gradients()
    heads(batch)
    assert all(p.grad is not None and p.grad.any() for p in model.student.embedder.projector.parameters() if p.ndim > 1)
    assert not any(True for _ in model.student.backbone.parameters())


def test_traffic_is_what_a_process_gives_to_a_collective(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rows, vector = torch.ones(5, 3), torch.ones(7, dtype=torch.int64)
        with Traffic() as traffic:
            dist.all_reduce(vector)
            dist.all_gather([torch.empty_like(rows)], rows)
            dist.all_gather([torch.empty_like(vector)], vector)
    finally:
        dist.destroy_process_group()
    assert traffic.calls == {"allreduce": 1, "allgather": 2}
    assert traffic.key_bytes == 5 * 3 * 4
    assert traffic.total_bytes == 5 * 3 * 4 + 2 * 7 * 8


@pytest.mark.slow
def test_batches_regions_and_processes(tmp_path):
    record = growth.run(SIZES, ["batch", "regions", "processes"])
    points = [(p["precision"], p["checkpointing"], p["batch_size"]) for p in record["batch"]["points"]]
    assert sorted(points) == [(p, c, n) for p in ("bfloat16", "float32") for c in (False, True) for n in (2, 3)]
    assert [p["regions"] for p in record["regions"]["points"]] == [1, 4]
    points = {(p["method"], p["processes"], p["batch_size"], p["norm"]): p for p in record["processes"]["points"]}
    for method in ("SlotCon", "DetCon-B"):
        assert points[method, 1, 2, "BN"]["traffic"] is None
        parts = [points[method, 2, n, norm] for norm, n in (("SyncBN", 2), ("BN", 2), ("SyncBN", 1))]
        sync, local, half = (p["traffic"] for p in parts)
        assert sync["gradient_bytes"] == local["gradient_bytes"] == half["gradient_bytes"] > 0
        # The statistics of SyncBN are of channels, whatever the batch; without it a few numbers for the log remain.
        assert sync["other_bytes"] == half["other_bytes"] > 10 * local["other_bytes"] >= 0
        assert parts[0]["ms_per_image"] == pytest.approx(1e3 * parts[0]["wall_s"] / 4)
    # Targets of N images, two views, M = 4 regions, in float32; the active slots of SlotCon are not as many everywhere.
    for norm, n in (("SyncBN", 2), ("BN", 2), ("SyncBN", 1)):
        assert points["DetCon-B", 2, n, norm]["traffic"]["key_bytes"] == n * 2 * 4 * DIM * 4
    growth.draw_growth(tmp_path / "growth.png", record)
    height, width = matplotlib.image.imread(tmp_path / "growth.png").shape[:2]
    assert width > height > 500  # four panels in three columns
