"""The report's figures.

`figure.py` renders panels; `axes.py` and `lines.py` are parts that panels share. The panels: `quality.py` (metrics against cost),
`steps.py` (values over steps), `experts.py` (MoE layers), `ends.py` (first and last values).
"""
