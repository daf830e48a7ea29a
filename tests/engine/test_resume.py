"""Runs that go on as if they had not stopped, most of them in this process."""

import logging
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase, default_argument_parser, hooks
from detectron2.utils.env import seed_all_rng
from kill_and_resume import difference, first_difference, run_trials
from lazy_config import TINY_LAZY
from torch import nn

from focal_det import add_config
from focal_det.data.loader import TrainLoader
from focal_det.engine import Trainer, run_lazy
from focal_det.engine.checkpoint import Checkpointer
from focal_det.engine.resume import RunState, drop_unfit_state

DEMO = Path(__file__).parents[2] / "configs/demo/focal_retinanet_digits.yaml"


def config(name, output, *options):
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(DEMO)
    options = [
        *("DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "MODEL.RETINANET.NUM_CLASSES", 2),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 3),
        *("SOLVER.WARMUP_ITERS", 4, "INPUT.MIN_SIZE_TRAIN", (48, 64), "OUTPUT_DIR", str(output)),
        *options,
    ]
    cfg.merge_from_list(options)
    return cfg


class Stop(HookBase):
    """Ends the process, as far as training can tell."""

    class Killed(BaseException):
        pass

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Stop.Killed


def train(cfg, stop_at=None, resume=False, kind=Trainer, **arguments):
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    seed_all_rng(cfg.SEED)
    trainer = kind(cfg, **arguments)
    trainer.resume_or_load(resume)
    if stop_at is None:
        trainer.train()
        return trainer
    # A killed process runs no after_train.
    trainer.after_train = lambda: None
    trainer.register_hooks([Stop(stop_at)])
    with pytest.raises(Stop.Killed):
        trainer.train()
    return trainer


def test_a_stopped_run_ends_as_one_that_was_not(small, tmp_path):
    """Stopped before the first checkpoint, after one, and in between."""
    train(config(small, tmp_path / "whole"))
    for iteration in (2, 3, 7):
        output = tmp_path / f"stopped_{iteration}"
        train(config(small, output), stop_at=iteration)
        # Whatever the new process drew before it loads the checkpoint.
        torch.rand(5)
        trainer = train(config(small, output), resume=True)
        assert trainer.start_iter == iteration // 3 * 3
        assert difference(tmp_path / "whole", output) is None


def test_the_comparison_sees_a_single_bit(tmp_path):
    a = {"x": [torch.zeros(3), (1, math.nan)]}
    assert first_difference(a, {"x": [torch.zeros(3), (1, math.nan)]}) is None
    assert first_difference(a, {"x": [torch.tensor([0.0, -0.0, 0.0]), (1, math.nan)]}) == (
        "['x'][0]: tensors differ"
    )
    assert first_difference(a, {"x": [torch.zeros(3), (2, math.nan)]}) == "['x'][1][0]: 1 and 2"
    assert first_difference(a, {"x": [torch.zeros(3)]}) == "['x']: 2 and 1 entries"
    assert first_difference({"a": 1}, {"b": 1}) == ": keys ['a', 'b']"
    assert first_difference(1, 1.0) == ": int and float"


def test_a_killed_process_ends_as_one_that_was_not():
    """The short form of tests/kill_and_resume.py: SIGKILL, with two data workers."""
    (trial,) = run_trials(kills=1, processes=[1], workers=[2], seed=1)
    assert trial["difference"] is None


@pytest.mark.slow
def test_twenty_killed_runs_end_as_one_that_was_not():
    trials = run_trials(kills=20, processes=[1, 2], workers=[0, 2], seed=0)
    assert [trial["difference"] for trial in trials] == [None] * 20


def test_another_loss_is_refused(small, tmp_path):
    train(config(small, tmp_path / "run"), stop_at=4)
    changed = config(small, tmp_path / "run", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.0)
    message = (
        r"the loss is 'FocalLoss\(alpha=0.25, gamma=1.0\)', but the checkpoint was trained with "
        r"'FocalLoss\(alpha=0.25, gamma=2.0\)'.*--allow-changes"
    )
    with pytest.raises(ValueError, match=message):
        train(changed, resume=True)
    trainer = train(changed, resume=True, allow_changes=True)
    assert trainer.start_iter == 3


def test_another_number_of_classes_is_refused(small, tmp_path, monkeypatch):
    cfg = config(small, tmp_path / "run")
    train(cfg, stop_at=4)
    monkeypatch.setattr("focal_det.config.dataset_classes", lambda name: None)
    changed = config(small, tmp_path / "run", "MODEL.RETINANET.NUM_CLASSES", 3)
    with pytest.raises(ValueError, match=r"the number of classes is 3, .* trained with 2"):
        train(changed, resume=True)
    trainer = train(changed, resume=True, allow_changes=True)
    assert trainer.model.head.cls_score.weight.shape[0] == 12 * 3


def test_state_of_parameters_of_another_shape_is_forgotten():
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept = optimizer.state[model.bias]["momentum_buffer"]
    optimizer.state[model.weight]["momentum_buffer"] = torch.zeros(5, 2)
    drop_unfit_state(optimizer)
    assert model.weight not in optimizer.state
    assert optimizer.state[model.bias]["momentum_buffer"] is kept


def test_a_checkpoint_of_detectron2s_trainer_is_taken_up_with_a_warning(small, tmp_path, caplog):
    cfg = config(small, tmp_path / "run")
    train(cfg, stop_at=4)
    path = tmp_path / "run" / "model_0000002.pth"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["trainer"]["hooks"]["RunState"]
    torch.save(checkpoint, path)
    lines = (tmp_path / "run" / "metrics.json").read_text()
    with caplog.at_level(logging.WARNING):
        trainer = train(cfg, resume=True)
    assert trainer.start_iter == 3
    assert "not one of focal_det's trainer" in caplog.text
    assert (tmp_path / "run" / "metrics.json").read_text().startswith(lines)


def test_another_number_of_processes_is_told(small, tmp_path, caplog):
    cfg = config(small, tmp_path / "run")
    train(cfg, stop_at=4)
    path = tmp_path / "run" / "model_0000002.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["trainer"]["hooks"]["RunState"]["workers"] *= 2
    torch.save(checkpoint, path)
    with caplog.at_level(logging.WARNING):
        train(cfg, resume=True)
    assert "random states of 2 processes and this run has 1" in caplog.text


def test_without_resume_nothing_that_is_there_is_cut(small, tmp_path):
    cfg = config(small, tmp_path / "run")
    train(cfg)
    before = (tmp_path / "run" / "metrics.json").read_text()
    train(cfg)
    assert (tmp_path / "run" / "metrics.json").read_text().startswith(before)


def test_metrics_are_cut_where_the_checkpoint_was(tmp_path, caplog):
    """Whatever else is in the file, which another run may have begun."""
    path = tmp_path / "metrics.json"
    loader = TrainLoader([{}], dict, lambda: None, 1, aspect_ratio_grouping=False)

    def state(size):
        run = RunState(nn.Identity(), loader, {}, 5, path)
        run.load_state_dict(
            {"identity": {}, "settings": {}, "seed": 3, "metrics_size": size, "written": 9}
        )
        return run

    path.write_text("of another run\n12345")
    with path.open("a") as writer:  # as Detectron2's writer has it open by then
        state(17).start(10, found=True)
        assert path.read_text() == "of another run\n12"
        writer.write("6")
    assert path.read_text() == "of another run\n126"
    state(100).start(10, found=True)
    assert path.read_text() == "of another run\n126"
    RunState(nn.Identity(), loader, {}, 5, path).start(0, found=None)
    assert path.read_text() == "of another run\n126"
    RunState(nn.Identity(), loader, {}, 5, path).start(0, found=False)
    assert path.read_text() == ""
    assert "is cut to what it was" in caplog.text
    assert loader.seed == 3


def test_a_kill_between_the_two_last_files_is_mended(small, tmp_path):
    """With a period that divides the iterations, the last step writes two checkpoints."""
    options = ("SOLVER.MAX_ITER", 6)
    train(config(small, tmp_path / "whole", *options))
    output = tmp_path / "killed"
    train(config(small, output, *options))
    (output / "model_final.pth").unlink()
    (output / "last_checkpoint").write_text("model_0000005.pth")
    train(config(small, output, *options), resume=True)
    assert difference(tmp_path / "whole", output) is None


def test_hooks_of_a_subclass_take_part_in_the_pending_step(small, tmp_path):
    class Validation(HookBase):
        def after_step(self):
            if (self.trainer.iter + 1) % 3 == 0:
                self.trainer.storage.put_scalar("validation", self.trainer.iter)

    class Subclass(Trainer):
        def build_hooks(self):
            made = super().build_hooks()
            made.insert(-1, Validation())
            return made

    train(config(small, tmp_path / "whole"), kind=Subclass)
    train(config(small, tmp_path / "run"), stop_at=4, kind=Subclass)
    train(config(small, tmp_path / "run"), resume=True, kind=Subclass)
    assert difference(tmp_path / "whole", tmp_path / "run") is None


def test_precise_batch_norm_goes_on_too(small, tmp_path):
    options = (
        *("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "TEST.EVAL_PERIOD", 3),
        *("DATASETS.TEST", (small,)),
    )
    train(config(small, tmp_path / "whole", *options))
    train(config(small, tmp_path / "run", *options), stop_at=7)
    train(config(small, tmp_path / "run", *options), resume=True)
    assert difference(tmp_path / "whole", tmp_path / "run") is None


def test_a_subclass_that_drops_our_hooks_is_told(small, tmp_path):
    class Scratch(Trainer):
        def build_hooks(self):
            return [hooks.IterationTimer()]

    with pytest.raises(TypeError, match=r"Scratch\.build_hooks must add to super\(\)"):
        train(config(small, tmp_path / "run"), kind=Scratch)


def test_a_loader_of_ones_own_is_told(small, tmp_path, caplog):
    class Plain(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    train(config(small, tmp_path / "run"), stop_at=4, kind=Plain)
    train(config(small, tmp_path / "run"), resume=True, kind=Plain)
    assert "not loaded by focal_det.data.loader.build_train_loader" in caplog.text


def test_other_settings_are_told(small, tmp_path, caplog):
    train(config(small, tmp_path / "run"), stop_at=4)
    train(config(small, tmp_path / "run", "SOLVER.IMS_PER_BATCH", 3), resume=True)
    assert "SOLVER.IMS_PER_BATCH is 3, the checkpoint was made with 2" in caplog.text


def test_a_period_of_0_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"CHECKPOINT_PERIOD .* must be 1 or more .*, got 0"):
        train(config(small, tmp_path / "run", "SOLVER.CHECKPOINT_PERIOD", 0))


def test_its_place_is_before_the_checkpoint_or_the_evaluation(tmp_path):
    timer, evaluation = hooks.IterationTimer(), hooks.EvalHook(5, dict)
    saving = hooks.PeriodicCheckpointer(Checkpointer(nn.Identity(), str(tmp_path)), 5)
    run = RunState(nn.Identity(), None, {}, 5, "metrics.json")
    assert run.join([timer, saving, evaluation]) == [timer, run, saving, evaluation]
    assert run.join([timer, evaluation]) == [timer, run, evaluation]
    assert run.join([timer]) == [timer, run]


LAZY = """
model.num_classes = 2
del dataloader.evaluator
dataloader.train.dataset.names = dataloader.test.dataset.names = "{name}"
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = [48, 64]
train.update(
    init_checkpoint="", device="cpu", max_iter=5, eval_period=0, log_period=2, seed=3,
    checkpointer=dict(period=2, max_to_keep=10), output_dir="{output}",
)
"""


def test_a_lazy_config_resumes_exactly_too(small, tmp_path, monkeypatch):
    def run(name, *flags):
        file = tmp_path / f"{name}.py"
        file.write_text(TINY_LAZY + LAZY.format(name=small, output=tmp_path / name))
        parser = default_argument_parser()
        parser.add_argument("--allow-changes", action="store_true")
        run_lazy(parser.parse_args(["--config-file", str(file), *flags]))

    def stop(hook):
        if hook.trainer.iter == 3:
            raise Stop.Killed

    run("whole")
    monkeypatch.setattr(RunState, "before_step", stop)
    with pytest.raises(Stop.Killed):
        run("stopped")
    monkeypatch.undo()
    run("stopped", "--resume")
    assert difference(tmp_path / "whole", tmp_path / "stopped") is None
