"""Table 3: normalised combine weights in a V-MoE-B/32 from scratch (arXiv 2212.05055).

JFT precision at 1 and ImageNet 10-shot accuracy. Capacity 1: raw 48.71 / 69.68, normalised 48.23 / 70.19; capacity 2: raw
50.02 / 71.26, normalised 49.75 / 71.55. Normalising costs a little upstream, and helps a little few-shot.

  upcycle sweep --config=configs/table_3.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/table_3.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/table_3.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    setting = paper.setting_of('vision', at, 'b32')
    branches = {}
    for factor in (1.0, 2.0):
        for name, normalized in (('raw', False), ('normalised', True)):
            bindings = {'NORMALIZE_COMBINE_WEIGHTS': normalized, **paper.capacity(factor)}
            branches[f'scratch, {name}, cf={factor:g}'] = paper.from_scratch(**bindings)
    panel = paper.Panel(setting, 'Table 3: normalised weights from scratch', branches)
    for factor, numbers in ((1, ('48.71 to 48.23', '70.19 to 69.68')), (2, ('50.02 to 49.75', '71.55 to 71.26'))):
        raw, normalized = (f'scratch, {name}, cf={factor}' for name in ('raw', 'normalised'))
        text = f'At factor {factor}, raw weights end ahead upstream.'
        panel.claim(text, raw, normalized, metric='accuracy', paper=numbers[0])
        if at is paper.Scale.MINI:
            text = f'At factor {factor}, normalised weights end ahead in 10-shot accuracy.'
            panel.claim(text, normalized, raw, metric='few_shot/10shot', paper=numbers[1])
    panel.table(
        {
            'scratch, raw, cf=1': (48.71, 69.68),
            'scratch, normalised, cf=1': (48.23, 70.19),
            'scratch, raw, cf=2': (50.02, 71.26),
            'scratch, normalised, cf=2': (49.75, 71.55),
        },
        ('accuracy', 'few_shot/10shot'),
    )
    panel.final(
        'capacity factor',
        {name: {factor: f'scratch, {name}, cf={factor:g}' for factor in (1.0, 2.0)} for name in ('raw', 'normalised')},
        metrics=setting.end_metrics,
    )
    return paper.experiment('table_3', at, [panel])
