"""Figures 10, 11 and 12: how many experts, how many MoE layers, and where (arXiv 2212.05055).

Left of figure 10 and figure 11: 2 to 128 experts in the same layers. As in V-MoE, the slots of an expert are rounded up to a
multiple of 4, so with many experts the effective capacity factor is larger than configured (at the mini scale 2.00, 2.04, 2.12
and 2.29 for 4, 8, 16 and 32 experts; at full scale 1.06, 1.14 and 1.31 for 32, 64 and 128), and equal FLOPs are fewer steps.
Right of figure 10 and figure 12: the last n blocks at 32 experts. B/16 with capacity factor 1 in the paper; the mini scale keeps
factor 2, because at factor 1 a thousand steps do not make up for the tokens that no expert takes. The paper: upstream quality
rises with the number of experts, 10-shot accuracy saturates, more experts lose more at the start; 40 to 50% of the layers are
best, and more layers are not better even step for step.

  upcycle sweep --config=configs/figure_10.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_10.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_10.py --scale=full --where=print

This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    setting = paper.setting_of('vision', at)
    mini = at is paper.Scale.MINI
    counts = (2, 4, 8, 16, 32) if mini else (2, 4, 8, 16, 32, 64, 128)
    layers = (1, 2, 3, 4) if mini else (1, 3, 5, 6, 7, 9, 11)
    usual_layers = 4 if mini else 6
    ablation, plain = setting.ablation
    experts = {n: paper.of_experts(n, plain, setting) for n in counts}
    last = {n: plain if n == usual_layers else f'last {n}, {plain}' for n in layers}
    branches = {plain: paper.upcycled(**ablation)}
    branches |= {label: paper.upcycled(NUM_EXPERTS=n, **ablation) for n, label in experts.items() if label != plain}
    branches |= {
        label: paper.upcycled(MOE_LAYERS=f'last_{n}', **ablation) for n, label in last.items() if label != plain
    }
    branches['dense continuation'] = paper.CONTINUATION
    panel = paper.Panel(setting, 'Figures 10 to 12: experts and layers', branches)
    for few, many in zip(counts, counts[1:], strict=False):
        panel.claim(f'{many} experts end ahead of {few}.', experts[many], experts[few])
    text = f'{counts[0]} experts start ahead of {counts[-1]}.'
    panel.claim(text, experts[counts[0]], experts[counts[-1]], at=0.0)
    half = layers[len(layers) // 2 - 1] if mini else 6
    for n in layers:
        if n != half and not (n == 5 and half == 6):  # the two are equal in the paper
            panel.claim(f'MoE layers in the last {half} blocks end ahead of the last {n}.', last[half], last[n])
    text = f'Step by step too, MoE layers in the last {half} blocks end ahead of the last {layers[-1]}.'
    panel.claim(text, last[half], last[layers[-1]], per_step=True)
    panel.final('experts', {'upcycled': experts}, log=True, metrics=setting.end_metrics)
    panel.final('last blocks with MoE layers', {'upcycled': last}, metrics=setting.end_metrics)
    return paper.experiment('figure_10', at, [panel])
