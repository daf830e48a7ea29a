"""Train or evaluate a detector from a YAML or a LazyConfig file.

Takes the flags of Detectron2's own script:

    python tools/train_net.py --config-file configs/demo/focal_retinanet_digits.yaml \
        MODEL.FOCAL_DET.LOSS.NAME OHEMLoss
    python tools/train_net.py --config-file configs/lazy/focal_retinanet_R_50_FPN_1x.py \
        --num-gpus 8 model.cls_loss.gamma=1.0
"""

import argparse
from pathlib import Path

from detectron2.engine import default_argument_parser, launch

from focal_det.engine import run_lazy, run_yaml


def main(args: argparse.Namespace) -> None:
    """Run one worker."""
    run = run_lazy if args.config_file.endswith(".py") else run_yaml
    run(args)


def invoke_main() -> None:
    """Parse the command line and start the workers."""
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="with --resume: go on although the checkpoint is of another loss or number of classes",
    )
    args = parser.parse_args()
    if not Path(args.config_file).is_file():
        parser.error(f"--config-file must name a .yaml or .py file, got {args.config_file!r}")
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    invoke_main()
