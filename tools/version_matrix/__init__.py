"""What ``tools/test_matrix.py`` does, in this order.

:mod:`.combinations` says what is tested with what, :mod:`.environments` makes the environments of
Python and PyTorch, :mod:`.layers` puts a Detectron2 on top, :mod:`.outcomes` runs the tests and
tells what came of them, :mod:`.table` keeps records and shows them.
"""
