"""Figure 2, language: dense continuation and upcycling from one dense checkpoint (arXiv 2212.05055).

x: extra cost; y: C4 token accuracy, here also the loss. The paper shows curves but no numbers: the upcycled model falls at
first, then passes the dense continuation, and the gap widens.

  upcycle sweep --config=configs/figure_2_language.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_2_language.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_2_language.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    panels = []
    for setting in paper.every_size('language', at):
        branches = {'dense continuation': paper.CONTINUATION, 'upcycled': paper.UPCYCLED}
        panel = paper.Panel(setting, f'Figure 2: {setting.name}, upcycled and continued', branches)
        panel.claim('Upcycled ends ahead of its dense continuation.', 'upcycled', 'dense continuation')
        panel.claim(
            'Upcycled ends ahead of its dense continuation.', 'upcycled', 'dense continuation', metric='accuracy'
        )
        panel.claim('The upcycled model starts behind the dense one.', 'dense continuation', 'upcycled', at=0.0)
        panels.append(panel)
    # The mini scale's settings were chosen on seeds 0 to 2.
    seeds = range(6) if at is paper.Scale.MINI else range(3)
    return paper.experiment('figure_2_language', at, panels, seeds)
