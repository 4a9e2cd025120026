"""Figure 4: upcycling and MoE from scratch (arXiv 2212.05055).

x: cost (for a model from scratch, its own cost); y: upstream quality. The paper: the model from scratch is slower, catches up at
100 to 120% of the dense model's cost, and wins in the end. The extra budget at the mini scale is 129% of that cost for language
and 56% for vision; at full scale it is twice that of the other figures, to reach about 130%.

  upcycle sweep --config=configs/figure_4.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_4.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_4.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    panels = []
    for setting in (paper.setting_of('language', at), paper.setting_of('vision', at)):
        upcycled, budget = ('upcycled', 1.0) if at is paper.Scale.MINI else ('upcycled, twice the budget', 2.0)
        branches = {
            'dense continuation': paper.CONTINUATION,
            upcycled: paper.upcycled(budget=budget),
            'scratch': paper.SCRATCH,
        }
        panel = paper.Panel(setting, f'Figure 4: {setting.name}, upcycled and from scratch', branches)
        for share in (0.1, 0.25, 0.5):
            panel.claim(
                f"After {share:.0%} of the dense model's cost, upcycled is ahead of as much from scratch.",
                upcycled,
                'scratch',
                paper='scratch catches up at 100 to 120%',
                at=share,
            )
        if at is not paper.Scale.MINI or 'language' in setting.name:
            text = "After 120% of the dense model's cost, from scratch is ahead."
            panel.claim(text, 'scratch', upcycled, paper='scratch catches up at 100 to 120%', at=1.2)
        panels.append(panel)
    return paper.experiment('figure_4', at, panels)
