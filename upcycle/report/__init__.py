"""From run folders to a table and a page.

`runs.py` reads, `compare.py` computes, `claims.py`, `budgets.py` and `numbers.py` compare with the paper, `headlines.py` and
`tables.py` are text, `plots/` draws, `html.py` writes the page; `command.py` is `upcycle report`.
"""
