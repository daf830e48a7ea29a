"""Image files."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.data import detection_utils as utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from .findings import Finding
from .records import image_size, of_image, record_problem

DEEP_MODES = ("I", "F")  # Pillow's modes of more than 8 bits, "I;16" and its like included


def check_images(records: Sequence[Any], jobs: int = 1) -> Iterator[list[Finding]]:
    """Decode every image.

    Args:
        records: Detectron2's dictionaries.
        jobs: images at a time.

    Yields:
        The findings of each record, see :func:`check_image`; those that are malformed are left to
        :func:`check_records`.
    """
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        yield from pool.map(check_image, records)


def check_image(record: Any) -> list[Finding]:
    """Decode an image as training does, EXIF rotation included, and compare its size.

    Args:
        record: one of Detectron2's dictionaries. ``height`` and ``width`` are added where it has
            neither, as Detectron2 does.
    """
    if record_problem(record) is not None:
        return []
    file_name = record["file_name"]
    try:
        with PathManager.open(file_name, "rb") as file:
            if not file.read(1):
                return [of_image("empty-file", "the file is empty", record)]
            file.seek(0)
            image = Image.open(file)
            mode = image.mode
            brightest = 0.0
            if mode.startswith(DEEP_MODES):
                brightest = float(np.fmax.reduce(np.asarray(image), axis=None))  # NaN apart
        pixels = utils.read_image(file_name, format="BGR")
    except FileNotFoundError:
        return [of_image("missing-file", "there is no such file", record)]
    except Exception as error:  # decoders raise anything at all on broken files; reported
        return [of_image("unreadable-image", f"{type(error).__name__}: {error}", record)]
    findings = []
    if brightest > 255:
        message = (
            f"pixels of mode {mode!r} go up to {brightest:g}, and all above 255 become white: "
            "scale the file to 8 bits"
        )
        findings.append(of_image("deep-pixels", message, record))
    if ("height" in record or "width" in record) and image_size(record) is None:
        return findings  # left to check_records
    try:
        utils.check_image_size(record, pixels)
    except utils.SizeMismatchError:
        message = (
            f"the file is {pixels.shape[1]} x {pixels.shape[0]} (width x height, after its EXIF "
            f"rotation), the annotation says {record['width']!r} x {record['height']!r}"
        )
        findings.append(of_image("size-mismatch", message, record))
    return findings
