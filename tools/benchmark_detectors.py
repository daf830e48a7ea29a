"""FocalRetinaNet with each loss against Detectron2's and torchvision's detectors, on your data.

    python tools/benchmark_detectors.py --data digits_clutter --seeds 3
    python tools/benchmark_detectors.py --data cells --config configs/my_base.yaml --budget 5000

Same data, loaders, input size, schedule, seeds, backbone and its first weights; what differs all
the same is a column of the table. Each trial has a machine to itself, unless --cpus says otherwise:
trials that share a machine would slow each other. Resuming and output are those of
tools/ablate.py.
"""

import sys

import ablate

if __name__ == "__main__":
    command = ablate.Command("detectors", "output/detectors", __doc__)
    sys.exit(ablate.main(command=command))
