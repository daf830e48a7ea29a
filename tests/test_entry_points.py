"""The three ways in, each in processes of its own, as a user starts them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from lazy_config import TINY_LAZY
from PIL import Image

ROOT = Path(__file__).parent.parent
OURS = ROOT / "tools" / "train_net.py"
LOSSES = [
    "BalancedCrossEntropyLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "FocalLossStar",
    "HingeLoss",
    "OHEMLoss",
]
TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.NORM", "BN",
    "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.RETINANET.NUM_CLASSES", "2",
    "DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_train',)",
    "DATALOADER.NUM_WORKERS", "0", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "2",
    "SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    "SEED", "1",
]  # fmt: skip


def stock_script() -> Path:
    """Detectron2's own train_net.py, where its wheel puts it."""
    spec = find_spec("detectron2")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent.parent / "tools" / "train_net.py"
    if not path.is_file():
        pytest.skip("this Detectron2 comes without its tools/train_net.py")
    return path


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A COCO-format set of four images, one without objects, named in FOCAL_DET_DATASETS."""
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 64})
        for number in range(index):
            x, y = rng.integers(0, 32, 2).tolist()
            pixels[y : y + 32, x : x + 32, number % 3] = 255
            box = {"id": len(annotations) + 1, "image_id": index, "bbox": [x, y, 32, 32]}
            annotations.append({**box, "category_id": 1 + number % 2, "area": 1024, "iscrowd": 0})
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    categories = [{"id": 1, "name": "odd"}, {"id": 2, "name": "even"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "train.json").write_text(json.dumps(coco))
    monkeypatch.setenv("FOCAL_DET_DATASETS", f"shapes_train:{tmp_path}/train.json:{tmp_path}")
    return tmp_path


def run(*command, check=True, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    output = result.stdout + result.stderr
    assert not check or result.returncode == 0, output[-4000:]
    return result.returncode, output


def last_metrics(folder):
    """The last value of each metric: a record holds those of one iteration."""
    latest = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        latest.update(json.loads(line))
    return latest


@pytest.mark.parametrize("loss", LOSSES)
def test_stock_script_trains_with_each_loss(shapes, tmp_path, loss):
    _, output = run(
        stock_script(), "--config-file", ROOT / "configs" / "Base-FocalRetinaNet.yaml", *TINY,
        "OUTPUT_DIR", tmp_path / "out", "MODEL.FOCAL_DET.LOSS.NAME", loss,
        DETECTRON2_ENV_MODULE="focal_det.env",
    )  # fmt: skip
    assert f"{loss}(" in output  # the start-up line
    record = last_metrics(tmp_path / "out")
    assert {"loss_cls", "loss_box_reg", "classification/foreground", "bbox/AP50"} <= set(record)
    assert np.isfinite([record["loss_cls"], record["loss_box_reg"]]).all()


@pytest.mark.parametrize("door", ["stock", "ours"])
def test_two_processes_train(shapes, tmp_path, door):
    environment = {"DETECTRON2_ENV_MODULE": "focal_det.env"} if door == "stock" else {}
    run(
        stock_script() if door == "stock" else OURS,
        "--config-file", ROOT / "configs" / "Base-FocalRetinaNet.yaml",
        "--num-gpus", 2, "--dist-url", "auto", *TINY, "OUTPUT_DIR", tmp_path / "out",
        "SOLVER.IMS_PER_BATCH", 4, **environment,
    )  # fmt: skip
    assert np.isfinite(last_metrics(tmp_path / "out")["total_loss"])
    assert (tmp_path / "out" / "model_final.pth").is_file()


def test_our_script_trains_resumes_and_evaluates(shapes, tmp_path):
    command = [OURS, "--config-file", ROOT / "configs" / "Base-FocalRetinaNet.yaml"]
    options = [*TINY, "OUTPUT_DIR", tmp_path / "out"]
    run(*command, *options)
    _, output = run(*command, "--resume", *options, "SOLVER.MAX_ITER", 3)
    assert "Starting training from iteration 2" in output
    weights = tmp_path / "out" / "model_final.pth"
    _, output = run(*command, "--eval-only", *options, "MODEL.WEIGHTS", weights)
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in output


def test_our_script_trains_a_lazy_config(shapes, tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(TINY_LAZY)
    overrides = [
        "model.num_classes=2", "model.cls_loss.gamma=1.0", "train.device=cpu", "train.max_iter=2",
        "train.init_checkpoint=''", f"train.output_dir={tmp_path}/out",
        "dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0", "dataloader.train.dataset.names=shapes_train",
        "dataloader.test.dataset.names=shapes_train", "train.log_period=1",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ]  # fmt: skip
    _, output = run(OURS, "--config-file", config, *overrides)
    assert "FocalLoss(alpha=0.25, gamma=1.0), normalizer EMANormalizer, prior 0.01, K=2" in output
    record = last_metrics(tmp_path / "out")
    assert np.isfinite(record["total_loss"])
    assert "bbox/AP50" in record
    checkpoint = f"train.init_checkpoint={tmp_path}/out/model_final.pth"
    _, output = run(OURS, "--config-file", config, "--eval-only", *overrides, checkpoint)
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in output


def test_a_lazy_config_with_another_class_count_stops(shapes, tmp_path):
    config = ROOT / "configs" / "lazy" / "focal_retinanet_R_50_FPN_1x.py"
    names = [f"dataloader.{split}.dataset.names=shapes_train" for split in ("train", "test")]
    code, output = run(
        OURS, "--config-file", config, *names, f"train.output_dir={tmp_path}/out",
        "model.num_classes=7", check=False,
    )  # fmt: skip
    assert code != 0
    assert "(in a LazyConfig: model.num_classes) is 7, but 'shapes_train'" in output


LIBRARY = """
import focal_det
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, launch

def main(config, options):
    cfg = get_cfg()
    focal_det.add_config(cfg)
    cfg.merge_from_file(config)
    cfg.merge_from_list(options)
    cfg.DATASETS.TEST = ()
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load()
    trainer.train()

if __name__ == "__main__":
    import sys
    launch(main, 2, dist_url="auto", args=(sys.argv[1], sys.argv[2:]))
"""


def test_two_processes_of_a_users_own_script_train(shapes, tmp_path):
    script = tmp_path / "own.py"
    script.write_text(LIBRARY)
    config = ROOT / "configs" / "Base-FocalRetinaNet.yaml"
    run(script, config, *TINY, "OUTPUT_DIR", tmp_path / "out", "SOLVER.IMS_PER_BATCH", 4)
    assert np.isfinite(last_metrics(tmp_path / "out")["total_loss"])


@pytest.mark.parametrize("order", [("detectron2", "focal_det"), ("focal_det", "detectron2")])
@pytest.mark.parametrize("env_module", [None, "focal_det.env"])
def test_both_import_orders(order, env_module):
    environment = {"DETECTRON2_ENV_MODULE": env_module} if env_module else {}
    code = f"""
import {order[0]}, {order[1]}
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.data import MetadataCatalog
cfg = get_cfg()
{"" if env_module else "focal_det.add_config(cfg)"}
assert cfg.MODEL.FOCAL_DET.LOSS.NAME == "FocalLoss"
assert "FocalRetinaNet" in META_ARCH_REGISTRY
assert MetadataCatalog.get("digits_clutter_train").evaluator_type == "coco"
assert detectron2.__version__ and focal_det.__version__
"""
    run("-c", code, **environment)


@pytest.mark.parametrize("door", ["stock", "ours"])
def test_the_readmes_own_loss_is_selected_and_configured(shapes, tmp_path, door):
    plugin = tmp_path / "poly_focal.py"
    readme = (ROOT / "README.md").read_text()
    plugin.write_text(readme.split("<!-- own-loss -->\n```python\n")[1].split("```")[0])
    environment = {"DETECTRON2_ENV_MODULE": "focal_det.env"} if door == "stock" else {}
    _, output = run(
        stock_script() if door == "stock" else OURS,
        "--config-file", ROOT / "configs" / "Base-FocalRetinaNet.yaml", *TINY,
        "OUTPUT_DIR", tmp_path / "out", "MODEL.FOCAL_DET.LOSS.NAME", "PolyFocalLoss",
        "MODEL.FOCAL_DET.POLY_FOCAL_LOSS.EPSILON", "0.5",
        FOCAL_DET_PLUGINS=str(plugin), **environment,
    )  # fmt: skip
    assert "PolyFocalLoss(gamma=2.0, epsilon=0.5)" in output


def test_missing_plugin_is_named(tmp_path):
    _, output = run(
        "-c", "import focal_det, detectron2.config as c; focal_det.add_config(c.get_cfg())",
        check=False, FOCAL_DET_PLUGINS=f"{tmp_path}/nowhere.py",
    )  # fmt: skip
    path = f"{tmp_path}/nowhere.py"
    assert f"FOCAL_DET_PLUGINS: {path!r}: ImportError: {path} is not a file" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.FOCAL_DET.LOSS.NAME", "FocalLos"], "'FocalLos', which is not one of: Balanced"),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "1.5"], "alpha must be in [0, 1], got 1.5"),
        (["MODEL.RETINANET.FOCAL_LOSS_GAMMA", "-1.0"], "gamma must be >= 0, got -1.0"),
        (
            ["MODEL.FOCAL_DET.LOSS.NAME", "FocalLossStar", "MODEL.FOCAL_DET.FL_STAR.GAMMA", "0.0"],
            "gamma must be > 0, got 0.0",
        ),
        (["MODEL.RETINANET.NUM_CLASSES", "3"], "is 3, but 'shapes_train'"),
    ],
)
def test_bad_values_stop_before_data_is_read(shapes, tmp_path, options, message):
    # An image that cannot be read would be met if data were read first.
    for image in shapes.glob("*.png"):
        image.write_bytes(b"no image")
    code, output = run(
        stock_script(), "--config-file", ROOT / "configs" / "Base-FocalRetinaNet.yaml", *TINY,
        "OUTPUT_DIR", tmp_path / "out", *options, check=False,
        DETECTRON2_ENV_MODULE="focal_det.env",
    )  # fmt: skip
    assert code != 0
    assert message in output


def test_missing_config_file_is_named():
    code, output = run(OURS, "--config-file", "nowhere.yaml", check=False)
    assert code == 2
    assert "--config-file must name a .yaml or .py file, got 'nowhere.yaml'" in output


def test_training_script_stays_short():
    assert len(OURS.read_text().splitlines()) <= 90
