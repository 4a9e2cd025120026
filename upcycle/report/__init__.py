"""From run folders to a table and a page: `runs` reads, `compare` computes, `plots` draws, `html` writes."""
