"""Figure 9: capacity factors (arXiv 2212.05055).

x: extra time; one curve per capacity factor; equal FLOPs, so larger factors take fewer steps. The paper: for vision
(B/16, 1 to 5) factors 2 and 3 are best and 1 and 5 worse, for language (T5 Base, 1 to 3) 2 is clearly best.

  upcycle sweep --config=configs/figure_9.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_9.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_9.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    panels = []
    of_vision = (1.0, 2.0, 3.0, 5.0) if at is paper.Scale.MINI else (1.0, 2.0, 3.0, 4.0, 5.0)
    for setting, factors in (
        (paper.setting_of('vision', at), of_vision),
        (paper.setting_of('language', at), (1.0, 2.0, 3.0)),
    ):
        labels = {factor: 'upcycled' if factor == 2 else f'cf={factor:g}' for factor in factors}
        branches = {
            label: paper.upcycled(**paper.capacity(f)) if f != 2 else paper.UPCYCLED for f, label in labels.items()
        }
        branches['dense continuation'] = paper.CONTINUATION
        panel = paper.Panel(setting, f'Figure 9: {setting.name}, capacity factors', branches)
        for factor, label in labels.items():
            if factor != 2 and (factor != 3 or 'language' in setting.name):
                panel.claim(f'Factor 2 ends ahead of factor {factor:g}.', 'upcycled', label)
        if 'vision' in setting.name:
            for factor in (1.0, 5.0):
                panel.claim(f'Factor 3 ends ahead of factor {factor:g}.', labels[3.0], labels[factor])
        panel.final('capacity factor', {'upcycled': labels})
        panels.append(panel)
    return paper.experiment('figure_9', at, panels)
