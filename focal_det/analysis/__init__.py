"""What training runs leave behind: statistics as plain dictionaries, drawing and pages apart.

``records``, ``matching`` and ``comparison`` work out numbers, ``drawing`` makes images of them,
``page``, ``figures`` and ``report`` make HTML. Import the modules themselves; drawing needs
matplotlib.
"""
