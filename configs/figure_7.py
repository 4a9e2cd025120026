"""Figure 7: experts copied and experts from scratch (arXiv 2212.05055).

The rest of the model is copied in both. x: extra cost. The paper: copies are far better; random experts catch up after
an extra cost of about the dense model's cost.

  upcycle sweep --config=configs/figure_7.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_7.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_7.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    panels = []
    for setting in (paper.setting_of('vision', at), paper.setting_of('language', at)):
        ablation, copied = setting.ablation
        random = 'random experts' if not ablation else f'random experts, {copied}'  # as figure 13 calls them
        branches = {
            'dense continuation': paper.CONTINUATION,
            copied: paper.upcycled(**ablation),
            random: paper.upcycled('surgery/random.gin', **ablation),
        }
        panel = paper.Panel(setting, f'Figure 7: {setting.name}, experts copied and random', branches)
        panel.claim('Copied experts end ahead of random ones.', copied, random)
        panel.claim('Copied experts start ahead of random ones.', copied, random, at=0.0)
        panels.append(panel)
    return paper.experiment('figure_7', at, panels)
