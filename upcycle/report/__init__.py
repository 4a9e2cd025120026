"""Reports: from run folders to a table and an HTML page.

`runs.py` reads run folders, `compare.py` compares them, `claims.py`, `budgets.py` and `numbers.py` compare with the paper,
`headlines.py` and `tables.py` format text, `plots/` draws, `html.py` writes the page, `command.py` is `upcycle report`.
"""
