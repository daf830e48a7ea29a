"""The door for Detectron2's own scripts: ``DETECTRON2_ENV_MODULE=focal_det.env``.

Detectron2 calls :func:`setup_environment` while ``import detectron2`` is still running, in every
process, spawned ones too. From then on ``get_cfg()`` has the keys of focal_det, and its
meta-architecture and data sets are registered. Two more variables are read, here as in our own
scripts: ``FOCAL_DET_DATASETS`` (:func:`focal_det.data.register_from_env`) and ``FOCAL_DET_PLUGINS``
(:func:`focal_det.plugins.load_plugins`).
"""


def setup_environment() -> None:
    """Add the config keys to Detectron2's defaults and register the parts of focal_det."""
    # Imported here and by full name: where `import focal_det` came first, that package is itself
    # half-imported at this moment.
    from detectron2.config.defaults import _C

    from focal_det import modeling  # noqa: F401  only registration
    from focal_det.config import add_config
    from focal_det.data import register_all

    register_all()
    # get_cfg() clones this node, and an unmodified script has no other place to learn of new keys.
    add_config(_C)
