"""Sweeps: grids of runs, described by a file of `configs/` or on the command line, run by a launcher.

`points.py` is a run of a grid and its progress, `grid.py` makes grids and reads configs, `paper/` makes those of the paper's
figures. `command.py` is `upcycle sweep`: `conduct.py` starts the points that are not finished, on a launcher of `launchers.py`;
`board.py` shows them; `reports.py` writes comparisons at the end; `programs.py` compiles instead.
"""
