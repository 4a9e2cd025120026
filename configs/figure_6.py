"""Figure 6: amount of dense pretraining before upcycling (arXiv 2212.05055).

x: dense steps before the branches; y: quality after the same extra cost. The paper (B/16, from 200,000 to 1.2 million
steps, 200,000 extra each): the gain of upcycling over the dense continuation hardly depends on the amount.

  upcycle sweep --config=configs/figure_6.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_6.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_6.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    setting = paper.setting_of('vision', at)
    ablation, plain = setting.ablation
    starts = (0.2, 0.4, 0.6, 0.8, 1.0)
    branches = {}
    for start in starts:
        branches[f'dense continuation after {start:.0%}'] = paper.continuation(budget=0.4, start=start)
        branches[f'{plain} after {start:.0%}'] = paper.upcycled(budget=0.4, start=start, **ablation)
    last = [label for label in branches if label.endswith('100%')]
    panel = paper.Panel(setting, 'Figure 6: amount of dense pretraining', branches, curves=last)
    for start in starts:
        panel.claim(
            f'After {start:.0%} of the dense steps, upcycled ends ahead.',
            f'{plain} after {start:.0%}',
            f'dense continuation after {start:.0%}',
        )
    for start in starts[:-1]:
        panel.claim(
            f'After {start:.0%} of the dense steps upcycling gains as much as after all of them, to 0.01 nats.',
            f'{plain} after {start:.0%}',
            f'dense continuation after {start:.0%}',
            than=(f'{plain} after 100%', 'dense continuation after 100%'),
            within=0.01,
        )
    series = {
        name: {start * setting.dense_steps: f'{name} after {start:.0%}' for start in starts}
        for name in (plain, 'dense continuation')
    }
    panel.final('dense steps before', series, metrics=setting.end_metrics)
    return paper.experiment('figure_6', at, [panel])
