"""Sweeps: a grid of runs, described by a file of `configs/` or on the command line, carried out by a launcher.

`points.py` says what a run of a grid is and how far it has come, `grid.py` makes grids and reads configs, `launchers.py` starts
runs somewhere, `conduct.py` starts what is missing, shows the grid as it goes and picks the best.
"""
