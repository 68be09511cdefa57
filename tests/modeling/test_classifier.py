"""ImageClassifier: its forward pass, what FREEZE_AT 5 freezes, runs through the trainer, and configs that it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from PIL import Image
from tiny_runs import train

from d2_objssl import add_objssl_config
from d2_objssl.data import register_image_folders
from d2_objssl.engine import Trainer, build_optimizer
from d2_objssl.modeling import ImageClassifier

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,val}/CLASS/*.png: three colours, with noise; 8 images of 24 x 24 pixels of each class."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.clip(rng.normal(colour, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def make_cfg(colours: Path, output_dir: Path, *opts: Any) -> CfgNode:
    """A linear classifier of 16-pixel images on a bottleneck ResNet of 4 to 32 channels; 30 iterations of 12 images."""
    cfg = get_cfg()
    add_objssl_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "quick" / "linear_classifier_R_18_imagenette.yaml"))
    names = [f"folders:{colours / split}" for split in ("train", "val")]
    register_image_folders(names)
    run: list[Any] = ["DATASETS.TRAIN", (names[0],), "DATASETS.TEST", (names[1],), "OUTPUT_DIR", str(output_dir)]
    run += ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
    run += ["MODEL.RESNETS.WIDTH_PER_GROUP", 4, "INPUT.CLASSIFICATION.CROP_SIZE", 16, "SOLVER.AMP.ENABLED", False]
    run += ["INPUT.CLASSIFICATION.TEST_SHORT_SIDE", 18, "SOLVER.IMS_PER_BATCH", 12, "SOLVER.MAX_EPOCHS", 0.0]
    run += ["SOLVER.MAX_ITER", 30, "SOLVER.STEPS", (), "SOLVER.STEPS_EPOCHS", (), "SOLVER.WARMUP_ITERS", 0]
    cfg.merge_from_list([*run, *opts])
    cfg.freeze()
    return cfg


def make_model(cfg: CfgNode, seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    return build_model(cfg)


def make_inputs(n: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return [{"image": image, "label": i % 3} for i, image in enumerate(images)]


def test_forward_is_pool_then_linear(colours, tmp_path):
    model = make_model(make_cfg(colours, tmp_path)).eval()
    inputs = make_inputs()
    images = torch.stack([x["image"] for x in inputs])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    features = model.backbone((images - mean) / std)["res5"].flatten(2).mean(2)
    logits = features @ model.linear.weight.T + model.linear.bias
    assert torch.allclose(torch.stack([x["scores"] for x in model(inputs)]), logits, atol=1e-6)
    loss = model.train()(inputs)  # a frozen backbone is the same in training
    assert loss.keys() == {"loss_cls"}
    torch.testing.assert_close(loss["loss_cls"], F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])))


@pytest.mark.slow
def test_a_frozen_backbone_stays_and_the_classifier_learns(colours, tmp_path):
    """After training all weights and batch-norm statistics are those of MODEL.WEIGHTS; colours are told apart all the same."""
    before = make_model(make_cfg(colours, tmp_path), seed=5).backbone.state_dict()
    assert any("running_mean" in k for k in before)
    torch.save({"model": before}, tmp_path / "backbone.pth")
    cfg = make_cfg(colours, tmp_path / "run", "MODEL.WEIGHTS", str(tmp_path / "backbone.pth"))
    train(cfg)
    trained = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    for name, value in before.items():
        assert torch.equal(trained[f"backbone.{name}"], value), name
    model = make_model(cfg)
    model.load_state_dict(trained)
    accuracy = Trainer.test(cfg, model)["classification"]
    assert accuracy.keys() == {"top1"} and accuracy["top1"] > 80  # chance: 33


def test_head_and_trunk_learn_at_their_own_rates(colours, tmp_path):
    """One step of plain SGD: the backbone moves by lr times its gradient, the head by 250 times that."""
    opts = ["MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.BASE_LR", 0.02, "SOLVER.HEAD_LR_FACTOR", 250.0]
    cfg = make_cfg(
        colours, tmp_path, *opts, "SOLVER.MOMENTUM", 0.0, "SOLVER.WARMUP_ITERS", 5, "MODEL.RESNETS.NORM", "BN"
    )
    model = make_model(cfg).train()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    model(make_inputs())["loss_cls"].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        lr = 0.02 if name.startswith("backbone.") else 5.0
        torch.testing.assert_close(p.detach(), before[name] - lr * p.grad, msg=name)
    rates = {g["lr"] for g in optimizer.param_groups}
    assert rates == {0.02, 5.0}
    Trainer.build_lr_scheduler(cfg, optimizer)  # begins with a warm-up
    low, high = sorted({g["lr"] for g in optimizer.param_groups})
    assert high / low == pytest.approx(250)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.CLASSIFIER.NUM_CLASSES", 10], r"NUM_CLASSES is 10, but .*/train\" has 3 classes"),
        (["MODEL.CLASSIFIER.IN_FEATURE", "res4"], r'IN_FEATURE is "res4", but the backbone gives res5'),
    ],
)
def test_configs_that_do_not_fit_are_refused(colours, tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        make_model(make_cfg(colours, tmp_path, *opts))
