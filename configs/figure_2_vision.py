"""Figure 2, vision: dense continuation and upcycling from one dense checkpoint (arXiv 2212.05055).

x: extra cost; y: JFT precision at 1, here also the loss. The paper shows curves but no numbers: the upcycled model falls at
first, then passes the dense continuation, and the gap widens.

  upcycle sweep --config=configs/figure_2_vision.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_2_vision.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_2_vision.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    panels = []
    for setting in paper.every_size('vision', at):
        branches = {'dense continuation': paper.CONTINUATION, 'upcycled': paper.UPCYCLED}
        panel = paper.Panel(setting, f'Figure 2: {setting.name}, upcycled and continued', branches)
        panel.claim('Upcycled ends ahead of its dense continuation.', 'upcycled', 'dense continuation')
        panel.claim(
            'Upcycled ends ahead of its dense continuation.', 'upcycled', 'dense continuation', metric='accuracy'
        )
        panel.claim('The upcycled model starts behind the dense one.', 'dense continuation', 'upcycled', at=0.0)
        panels.append(panel)
    return paper.experiment('figure_2_vision', at, panels)
