"""Sweeps: grids of runs, described by a file of `configs/` or by the command line, started by a launcher.

`points.py` is one run and its progress; `grid.py` makes grids and loads configs; `paper/` makes the configs of the paper's
figures. `command.py` is `upcycle sweep`: `conduct.py` starts the unfinished points on a launcher of `launchers.py`, `board.py`
shows their progress, `reports.py` writes the comparisons, and `programs.py` compiles programs instead of running points.
"""
