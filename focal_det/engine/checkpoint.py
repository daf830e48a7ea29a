"""Checkpoints that are whole or not there, and that execute nothing when they are read."""

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from focal_det.files import PARTIAL, write_whole
from focal_det.safe_loading import load_checkpoint, load_named_tensors, reads_by_torch_load


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe against kills, full disks and crafted files.

    A checkpoint is written beside its place, flushed to the disk and renamed, then
    ``last_checkpoint`` in the same way: whatever moment a process is killed at,
    ``last_checkpoint`` names a whole file. What is read goes through
    :mod:`focal_det.safe_loading`. Folders that are not local (``s3://...``) are written by
    Detectron2's own means.

    Args:
        model, save_dir, save_to_disk, checkpointables: see ``DetectionCheckpointer``.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and have ``last_checkpoint`` name it.

        Args:
            name: of the file, without its ending.
            kwargs: further data to keep.

        Raises:
            OSError: the disk is full, say; the last checkpoint stays as it was.
        """
        if not self._is_local():
            super().save(name, **kwargs)
            return
        if not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            write_whole(path, lambda file: torch.save({**data, **kwargs}, file))
            self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError) as error:  # PyTorch's writer wraps what the system said
            last = self.get_checkpoint_file() or "there is none yet"
            raise OSError(
                f"checkpoint {path} could not be written: {error}. The last one is untouched: "
                f"{last}"
            ) from error

    def get_checkpoint_file(self) -> str:
        """The file that ``last_checkpoint`` names, an empty text where there is none.

        Raises:
            FileNotFoundError: it names a file that is not there.
        """
        path: str = super().get_checkpoint_file()
        if path and self._is_local() and not Path(path).is_file():
            others = sorted(x.name for x in Path(self.save_dir).glob("*.pth"))
            raise FileNotFoundError(
                f"{Path(self.save_dir) / 'last_checkpoint'} names {Path(path).name!r}, which is "
                f"not there; write the name of another into it ({', '.join(others) or 'none'}) or "
                "remove it to begin anew"
            )
        return path

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Have ``last_checkpoint`` name this file."""
        if self._is_local():
            name = last_filename_basename.encode()
            write_whole(Path(self.save_dir) / "last_checkpoint", lambda file: file.write(name))
        else:
            super().tag_last_checkpoint(last_filename_basename)

    def remove_partial_files(self) -> None:
        """Remove what a process that was killed while it wrote has left."""
        if self._is_local() and self.save_to_disk:
            for name in (f"*.pth{PARTIAL}", f"last_checkpoint{PARTIAL}"):
                for path in Path(self.save_dir).glob(name):
                    path.unlink()

    def _is_local(self) -> bool:
        return bool(self.save_dir) and "://" not in self.save_dir

    def _load_file(self, filename: str) -> dict[str, Any]:
        if reads_by_torch_load(filename):
            loaded: dict[str, Any] = super()._load_file(filename)
            return loaded
        return load_checkpoint(filename)

    def _torch_load(self, f: str) -> Any:
        return load_named_tensors(f)
