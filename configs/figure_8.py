"""Figure 8: routers of the T5 encoder (arXiv 2212.05055).

Expert Choice, Top-2 with batch-prioritised filling, and Switch (Top-1, also in the decoder, which is Top-2 otherwise). x: extra
time; y: C4 token accuracy. The paper: Expert Choice is best on the time axis.

  upcycle sweep --config=configs/figure_8.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_8.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_8.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    setting = paper.setting_of('language', at)
    top_2 = paper.upcycled(ENCODER_ROUTER='top_k')
    # With one expert a token, a normalised weight would be 1 and give the router no gradient.
    switch = paper.upcycled(ENCODER_ROUTER='top_k', NUM_SELECTED_EXPERTS=1, NORMALIZE_COMBINE_WEIGHTS=False)
    branches = {'upcycled': paper.UPCYCLED, 'Top-2 encoder': top_2, 'Switch': switch}
    branches['dense continuation'] = paper.CONTINUATION
    panel = paper.Panel(setting, 'Figure 8: routers', branches)
    panel.claim('Expert Choice ends ahead of Top-2.', 'upcycled', 'Top-2 encoder')
    panel.claim('Expert Choice ends ahead of Switch.', 'upcycled', 'Switch')
    return paper.experiment('figure_8', at, [panel])
