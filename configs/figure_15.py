"""Figure 15: quality before any training, by capacity factor and normalisation (arXiv 2212.05055).

The model is upcycled and evaluated, then trained for a single step. B/16 and L/16. The paper: with normalised combine weights and
a large capacity, the upcycled model equals the dense model; without, it starts far behind.

  upcycle sweep --config=configs/figure_15.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_15.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_15.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    mini = at is paper.Scale.MINI
    panels = []
    for size in (None,) if mini else ('b16', 'l16'):
        setting = paper.setting_of('vision', at, size)
        factors = (1.0, 2.0, 4.0, float(setting.num_experts))
        tiny = 0.5 / setting.extra_steps
        made = {
            name: {factor: f'{name}, cf={factor:g}, untrained' for factor in factors} for name in ('normalised', 'raw')
        }
        branches = {
            label: paper.upcycled(
                budget=tiny,
                NORMALIZE_COMBINE_WEIGHTS=name == 'normalised',
                STEP_0_CAPACITY_FACTORS=(),
                **paper.capacity(f),
            )
            for name, labels in made.items()
            for f, label in labels.items()
        }
        branches['dense, one more step'] = paper.continuation(budget=tiny)
        panel = paper.Panel(setting, f'Figure 15: {setting.name} before training', branches)
        for factor in factors[:-1]:
            panel.claim(
                f'At factor {factor:g}, normalised weights start ahead of raw ones.',
                made['normalised'][factor],
                made['raw'][factor],
                at=0.0,
            )
        text = f'At factor {factors[-1]:g}, normalised weights start as the dense model does, to 0.001 nats.'
        panel.claim(text, made['normalised'][factors[-1]], 'dense, one more step', at=0.0, within=0.001)
        for low, high in zip(factors, factors[1:], strict=False):
            panel.claim(
                f'Factor {high:g} starts ahead of {low:g}.', made['normalised'][high], made['normalised'][low], at=0.0
            )
        panel.final('capacity factor', made, log=True, at_start=True)
        panels.append(panel)
    return paper.experiment('figure_15', at, panels)
