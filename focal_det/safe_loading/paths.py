"""Paths out of annotation files."""

import os

ALLOW_OUTSIDE_IMAGES = "FOCAL_DET_ALLOW_OUTSIDE_IMAGES"


def check_inside(root: str, file_name: str) -> str:
    """The path of an image that annotations name, which must be inside the folder of the images.

    It is the text that decides, with ``..`` resolved in it: a symbolic link inside ``root`` may
    lead anywhere, for the owner of the folder made it and not the author of the annotations. As
    the path that is returned has no ``..`` left, none can climb out of a link's target either.

    Args:
        root: the folder of the images, local.
        file_name: relative to ``root``, or absolute, as in the annotations.

    Returns:
        The absolute path, normalised.

    Raises:
        ValueError: it is outside, and the environment variable FOCAL_DET_ALLOW_OUTSIDE_IMAGES is
            not ``1``.
    """
    folder = os.path.abspath(root)
    path = os.path.normpath(os.path.join(folder, file_name))
    inside = path.startswith(os.path.join(folder, ""))
    if not inside and os.environ.get(ALLOW_OUTSIDE_IMAGES) != "1":
        raise ValueError(
            f"file_name {file_name!r} in the annotations is not inside the image root {folder!r} "
            f"(it leads to {path!r}). Mend the annotations or the image root; if you trust the "
            f"annotations, {ALLOW_OUTSIDE_IMAGES}=1 allows it"
        )
    return path
