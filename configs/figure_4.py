"""Figure 4: upcycling and MoE from scratch (arXiv 2212.05055).

x: cost, of a model from scratch its own; y: upstream quality. The paper: from scratch is slower, catches up at 100 to 120%
of the dense model's cost, and wins in the end. The extra budget here goes as far as that for language, and to half of it
for vision.

  upcycle sweep --config=configs/figure_4.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_4.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_4.py --scale=full --where=print

Never run at full scale by this project.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Runs, and claims about them, at one of three scales."""
    at = paper.scale_of(scale)
    panels = []
    for setting in (paper.language(at), paper.vision(at)):
        branches = {'dense continuation': paper.CONTINUATION, 'upcycled': paper.UPCYCLED, 'scratch': paper.SCRATCH}
        panel = paper.Panel(setting, f'Figure 4: {setting.name}, upcycled and from scratch', branches)
        for share in (0.1, 0.25, 0.5):
            panel.claim(
                f"After {share:.0%} of the dense model's cost, upcycled is ahead of as much from scratch.",
                'upcycled',
                'scratch',
                paper='scratch catches up at 100 to 120%',
                at=share,
            )
        panels.append(panel)
    return paper.experiment('figure_4', at, panels)
