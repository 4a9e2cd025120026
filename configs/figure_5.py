"""Figure 5: sparse and dense upcycling of T5 (arXiv 2212.05055).

Dense upcycling makes a deeper dense model from a shallower one by repeating its layers. x: extra cost; y: C4 token accuracy.
The paper: depth tiling gains fast at first, passes the dense continuation, and ends below sparse upcycling. Depths are
doubled here; the paper does not give its factor.

  upcycle sweep --config=configs/figure_5.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_5.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_5.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    setting = paper.setting_of('language', at)
    deeper = {'NUM_ENCODER_LAYERS': 2 * setting.num_layers, 'NUM_DECODER_LAYERS': 2 * setting.num_layers}
    tiling = paper.Branch(
        run='continue_dense', files=('surgery/depth.gin',), bindings=deeper, role=paper.Role.OTHER, moe=False
    )
    branches = {'dense continuation': paper.CONTINUATION, 'upcycled': paper.UPCYCLED, 'depth tiling': tiling}
    panel = paper.Panel(setting, 'Figure 5: sparse and dense upcycling', branches)
    panel.claim('Depth tiling ends ahead of the dense continuation.', 'depth tiling', 'dense continuation')
    text = "After a tenth of the dense model's cost, depth tiling is ahead of the dense continuation."
    panel.claim(text, 'depth tiling', 'dense continuation', at=0.1)
    panel.claim('Sparse upcycling ends ahead of depth tiling.', 'upcycled', 'depth tiling')
    return paper.experiment('figure_5', at, [panel])
