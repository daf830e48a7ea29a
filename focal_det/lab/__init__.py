"""The paper lab: tables of trials, run as sweeps, and what came of them beside the paper's numbers.

* :mod:`.tables`: which rows a table has, by config overrides; :mod:`.rivals`: other detectors;
* :mod:`.trials`: a row, a data set, a budget and a seed as one complete config;
* :mod:`.running`: one trial, from its config to its record; :mod:`.sweep`: many, on Ray;
* :mod:`.summary`: records to means, spreads and ranks; :mod:`.markdown`, :mod:`.charts`: as text
  and as a picture;
* :mod:`.figures`: the paper's figures; :mod:`.loss_cdf`: who makes up the loss of a detector.
"""
