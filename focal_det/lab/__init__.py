"""The paper lab: tables of trials, run as sweeps, and what came of them beside the paper's numbers.

* :mod:`.tables`: which rows a table has, by config overrides; :mod:`.rivals`: other detectors, of
  which :mod:`.torchvision_detectors` are two;
* :mod:`.trials`: a row, a data set, a budget and a seed as one complete config;
* :mod:`.running`: one trial, from its config to its record; :mod:`.measuring`: its times, memory
  and size; :mod:`.trial_records`: the form of the record; :mod:`.sweep`: many trials, on Ray;
* :mod:`.summary`: records to means, spreads and ranks; :mod:`.markdown`, :mod:`.charts`: as text
  and as a picture;
* :mod:`.figures`: the paper's figures; :mod:`.loss_cdf`: who makes up the loss of a detector;
  :mod:`.imbalance`: how losses fare as foreground gets rarer;
* :mod:`.results`: sweeps whose records are kept; :mod:`.report`: all that a folder holds as a page.
"""
