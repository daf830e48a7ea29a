"""The paper lab: tables of trials, run as sweeps, and what came of them beside the paper's numbers.

=============== ===============================================================
:mod:`.tables`  which rows a table has, by config overrides
:mod:`.trials`  a row, a data set, a budget and a seed as one complete config
:mod:`.running` one trial, from its config to its record
:mod:`.sweep`   many trials on Ray
:mod:`.summary` records to means, spreads and ranks beside the paper's
:mod:`.charts`  the same as a picture
=============== ===============================================================
"""
