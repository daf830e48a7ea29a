"""One page of all records below a folder: sweeps, comparisons of losses, training runs.

* :mod:`.finding`: which files are records, and what they hold; :mod:`.reading`: one of them;
* :mod:`.sweeps`: a sweep's records as tables; :mod:`.detections`: what a run saw in some images;
* :mod:`.differences`: settings and machines in which runs differ;
* :mod:`.sweep_section`, :mod:`.run_section`, :mod:`.setup_section`: these as HTML;
* :mod:`.overview`: the page.
"""
