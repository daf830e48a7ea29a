"""Tables of trials: the paper's, which are files beside this one, and a user's own.

A table is a YAML file with ``title``, ``source``, ``overrides`` of all rows, ``speed: true`` to
show time, memory and size, and ``rows``, each with a ``label``, ``overrides`` and, for what depends
on the config it starts from:

* ``anchors: {scales: n, aspect_ratios: m}``: n anchor sizes to the octave, from the smallest of
  each level on, and the middle m of the ratios 1/2, 1, 2;
* ``image_scale``: a factor of the image sizes, a number or a fraction such as ``400/600``;
* ``detector``: another one than FocalRetinaNet, by its name in :mod:`focal_det.lab.rivals`;
* ``deeper``: how many steps deeper the ResNet is, along 18, 34, 50, 101, 152;
* ``paper``: what the paper reports, by metric.

Instead of rows, ``axes`` may map config keys to lists of values; every combination is a row.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from yaml import YAMLError

from focal_det.analysis.records import METRICS
from focal_det.safe_loading import load_yaml

from .rivals import DIFFERENCES, choose_detector

FOLDER = Path(__file__).parent / "tables"
DEPTHS = (18, 34, 50, 101, 152)
RATIOS = {1: [1.0], 3: [0.5, 1.0, 2.0]}
MAX_SCALES = 8
MAX_IMAGE_SCALE = 100
PAPER_KEYS = (*METRICS, "milliseconds")
RESERVED = frozenset({"results", "metrics"})  # whose .json other tools write
TABLE_KEYS = frozenset({"title", "source", "overrides", "rows", "axes", "speed"})
NOT_OVERRIDES = {
    "DATASETS.TRAIN": "--data says that",
    "DATASETS.TEST": "--data says that",
    "SEED": "--seeds says how many there are, from 1 on",
    "OUTPUT_DIR": "--output says that",
    "MODEL.META_ARCHITECTURE": "a row's `detector` says that",
}
"""Keys that a sweep sets itself, and where it takes them from."""
ROW_KEYS = frozenset(
    {"label", "overrides", "anchors", "image_scale", "deeper", "detector", "paper"}
)


@dataclass(frozen=True)
class Row:
    """One setting of a table.

    Attributes:
        label: its name in the table.
        overrides: values by config key.
        paper: what the paper reports, by metric; percent, and ``milliseconds``.
        anchors: ``scales`` and ``aspect_ratios``, or None for the config's own.
        image_scale: factor of the image sizes.
        deeper: steps along :data:`DEPTHS`.
        detector: a key of :data:`focal_det.lab.rivals.DIFFERENCES`.
    """

    label: str
    overrides: dict[str, Any]
    paper: dict[str, float] = field(default_factory=dict)
    anchors: dict[str, int] | None = None
    image_scale: Fraction = Fraction(1)
    deeper: int = 0
    detector: str = "focal_det"

    def apply(self, cfg: CfgNode) -> None:
        """Change a config to this setting.

        Raises:
            AssertionError, KeyError, ValueError: an override that the config does not take, or a
                backbone that has no deeper one.
        """
        for key, value in self.overrides.items():
            check_override(key)
            if not all(math.isfinite(x) for x in _floats(value)):
                raise ValueError(f"{key} must be a finite number, got {value}")
            if value is None:
                # Detectron2 would take it for any key.
                raise ValueError(f"{key} must have a value, got null")
            if isinstance(value, Mapping):
                # It would replace a whole node, and what it does not name would be gone.
                raise ValueError(f"{key} must have one value, got {value}: write {key}.NAME: value")
        cfg.merge_from_list([x for pair in self.overrides.items() for x in pair])
        if self.anchors is not None:
            per_octave = self.anchors["scales"]
            factors = [2 ** (index / per_octave) for index in range(per_octave)]
            sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
            if not sizes or not all(sizes):
                raise ValueError(
                    f"MODEL.ANCHOR_GENERATOR.SIZES must have a list of sizes a level, got {sizes}"
                )
            cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
                [min(level) * factor for factor in factors] for level in sizes
            ]
            cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [RATIOS[self.anchors["aspect_ratios"]]]
        if self.image_scale != 1:
            for key in ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
                cfg.INPUT[key] = _scaled(key, cfg.INPUT[key], self.image_scale)
        if self.deeper:
            _deepen(cfg, self.deeper)
        choose_detector(cfg, self.detector)


@dataclass(frozen=True)
class Table:
    """A table of trials.

    Attributes:
        name: of its file.
        title, source: for its readers.
        rows: its settings.
        speed: whether time, memory and size are shown, and what differs between the rows.
    """

    name: str
    title: str
    source: str
    rows: tuple[Row, ...]
    speed: bool = False

    @property
    def timed(self) -> bool:
        """Whether it shows times, so that its trials must not share cores."""
        return self.speed or any("milliseconds" in row.paper for row in self.rows)


def check_override(key: str) -> None:
    """Refuse what would be overridden in turn.

    Raises:
        ValueError: says what to use instead.
    """
    if key in NOT_OVERRIDES:
        raise ValueError(f"{key} cannot be overridden: {NOT_OVERRIDES[key]}")


def built_in() -> list[str]:
    """Names of the tables that come with focal_det."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_table(name: str) -> Table:
    """Read a table.

    Args:
        name: one of :func:`built_in`, or the path of a YAML file.

    Raises:
        ValueError: no such table, or one that is not as described above; file and key are named.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise ValueError(
                f"--table must be one of {', '.join(built_in())}, all, or a YAML file, got {name!r}"
            )
    if path.stem in RESERVED or (
        path.stem in built_in() and path.resolve().parent != FOLDER.resolve()
    ):
        raise ValueError(f"{path}: a table cannot be called {path.stem}, other files are")
    with path.open(encoding="utf-8") as file:
        try:
            content = load_yaml(file)
        except YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    _check_keys(content, TABLE_KEYS, str(path))
    if ("rows" in content) == ("axes" in content):
        raise ValueError(f"{path} must have either rows or axes")
    shared = _mapping(content.get("overrides"), f"{path}: overrides")
    if "axes" in content:
        rows = _product(_mapping(content["axes"], f"{path}: axes"), shared, path)
    else:
        if not isinstance(content["rows"], list):
            raise ValueError(f"{path}: rows must be a list, got {content['rows']!r}")
        rows = [_row(entry, shared, path) for entry in content["rows"]]
    if not rows:
        raise ValueError(f"{path} has no row")
    labels = [row.label for row in rows]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"{path}: two rows are labelled {twice!r}")
    title, source = (str(content.get(key, "")) for key in ("title", "source"))
    speed = content.get("speed", False)
    if not isinstance(speed, bool):
        raise ValueError(f"{path}: speed must be true or false, got {speed!r}")
    return Table(path.stem, title or path.stem, source, tuple(rows), speed)


def _row(entry: Any, shared: dict[str, Any], path: Path) -> Row:
    _check_keys(entry, ROW_KEYS, f"{path}: a row")
    label = str(entry.get("label", "")).strip()
    if not label:
        raise ValueError(f"{path}: a row has no label: {entry}")
    where = f"{path}: row {label!r}"
    overrides = {**shared, **_mapping(entry.get("overrides"), f"{where}: overrides")}
    anchors = entry.get("anchors")
    if anchors is not None:
        anchors = _mapping(anchors, f"{where}: anchors")
        scales, ratios = anchors.get("scales"), anchors.get("aspect_ratios")
        known = _is_one_of(scales, range(1, MAX_SCALES + 1)) and _is_one_of(ratios, RATIOS)
        if not known or len(anchors) != 2:
            raise ValueError(
                f"{where}: anchors must have scales, 1 to {MAX_SCALES}, and aspect_ratios, "
                f"{' or '.join(map(str, RATIOS))}, got {anchors}"
            )
    try:
        scale = Fraction(str(entry.get("image_scale", 1)))
    except (ValueError, ZeroDivisionError):
        scale = Fraction(0)
    if not 0 < scale <= MAX_IMAGE_SCALE:
        raise ValueError(
            f"{where}: image_scale must be above 0, up to {MAX_IMAGE_SCALE}, got "
            f"{entry['image_scale']!r}"
        )
    deeper = entry.get("deeper", 0)
    if not _is_one_of(deeper, range(len(DEPTHS))):
        raise ValueError(f"{where}: deeper must be 0 to {len(DEPTHS) - 1}, got {deeper!r}")
    detector = entry.get("detector", "focal_det")
    if not isinstance(detector, str) or detector not in DIFFERENCES:
        raise ValueError(
            f"{where}: detector must be one of {', '.join(DIFFERENCES)}, got {detector!r}"
        )
    paper = _mapping(entry.get("paper"), f"{where}: paper")
    for key, value in paper.items():
        if key not in PAPER_KEYS:
            raise ValueError(f"{where}: paper: {key} is none of {', '.join(PAPER_KEYS)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"{where}: paper: {key} must be a number, got {value!r}")
    return Row(label, overrides, paper, anchors, scale, deeper, detector)


def _is_one_of(value: Any, whole: Iterable[int]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in whole


def _product(axes: dict[str, Any], shared: dict[str, Any], path: Path) -> list[Row]:
    if not axes:
        raise ValueError(f"{path}: axes must map config keys to lists of values, got none")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: axes: {key} must be a list of values, got {values!r}")
    rows = []
    for chosen in itertools.product(*axes.values()):
        overrides = dict(zip(axes, chosen, strict=True))
        # The last part of a key says enough unless two axes share it.
        ends = [key.rsplit(".", 1)[-1] for key in axes]
        names = list(axes) if len(set(ends)) < len(ends) else ends
        label = ", ".join(f"{name} {value}" for name, value in zip(names, chosen, strict=True))
        rows.append(Row(label, {**shared, **overrides}))
    return rows


def _check_keys(content: Any, allowed: frozenset[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must have {', '.join(sorted(allowed))}, got {content!r}")
    unknown = [str(key) for key in content if key not in allowed]
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(unknown)}, which is none of {', '.join(sorted(allowed))}"
        )


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{where} must map names to values, got {content!r}")
    return dict(content)


def _scaled(key: str, size: Any, factor: Fraction) -> Any:
    if isinstance(size, (tuple, list)):
        return type(size)(_scaled(key, each, factor) for each in size)
    made = round(size * factor)
    if size > 0 and made < 1:  # Detectron2 takes 0 for "as the image is"
        raise ValueError(f"image_scale {float(factor):g} leaves no pixel of INPUT.{key} {size}")
    return made


def _floats(value: Any) -> Iterator[float]:
    """The floats of a value, lists in it included."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _floats(each)


def _deepen(cfg: CfgNode, steps: int) -> None:
    """Choose a deeper ResNet, and its pretrained weights where the name of the file has the depth.

    Raises:
        ValueError: there is none.
    """
    depth = cfg.MODEL.RESNETS.DEPTH
    deeper = DEPTHS[DEPTHS.index(depth) + steps :] if depth in DEPTHS else ()
    if not deeper:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH is {depth}: there is no ResNet {steps} steps deeper along "
            f"{', '.join(map(str, DEPTHS))}"
        )
    weights, name = cfg.MODEL.WEIGHTS, f"R-{depth}."
    if weights and name not in weights:
        raise ValueError(
            f"MODEL.WEIGHTS {weights!r} has no {name!r} in its name to be replaced: give weights "
            f"of each depth such a name, or train from scratch with MODEL.WEIGHTS ''"
        )
    cfg.MODEL.RESNETS.DEPTH = deeper[0]
    cfg.MODEL.WEIGHTS = weights.replace(name, f"R-{deeper[0]}.")
