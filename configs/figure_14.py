"""Figure 14: optimizer state carried over or not, by the number of experts (arXiv 2212.05055).

x: extra time; curves for tiled and fresh optimizer state. B/16. The paper: carrying it over helps, equally for any number
of experts.

  upcycle sweep --config=configs/figure_14.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_14.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_14.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    setting = paper.setting_of('vision', at)
    ablation, plain = setting.ablation
    counts = (4, 16, 32) if at is paper.Scale.MINI else (8, 32, 128)
    tiled = {n: paper.of_experts(n, plain, setting) for n in counts}
    fresh = {n: f'fresh state, {label}' for n, label in tiled.items()}
    branches = {label: paper.upcycled(**paper.experts(n, setting), **ablation) for n, label in tiled.items()}
    branches |= {
        label: paper.upcycled(OPTIMIZER_STATE='fresh', **paper.experts(n, setting), **ablation)
        for n, label in fresh.items()
    }
    branches['dense continuation'] = paper.CONTINUATION
    panel = paper.Panel(setting, 'Figure 14: load optimizer', branches)
    for n in counts:
        panel.claim(f'With {n} experts, carried-over state ends ahead of fresh.', tiled[n], fresh[n])
    few, many = counts[0], counts[-1]
    panel.claim(
        f'It gains as much with {many} experts as with {few}, to 0.01 nats.',
        tiled[many],
        fresh[many],
        than=(tiled[few], fresh[few]),
        within=0.01,
    )
    panel.final('experts', {'tiled': tiled, 'fresh': fresh}, log=True)
    return paper.experiment('figure_14', at, [panel])
