"""Figure 13: experts copied or not, by the number of experts (arXiv 2212.05055).

x: extra time; curves for copied and random experts at several numbers of experts. B/16. The paper: random experts recover
slowly, more so with more experts; copying only part of the experts is worse than copying all.

  upcycle sweep --config=configs/figure_13.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_13.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_13.py --scale=full --where=print

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
    copied = {n: paper.of_experts(n, plain, setting) for n in counts}
    # Without ablation bindings the middle one is the run of figure 7.
    random_plain = 'random experts' if not ablation else f'random experts, {plain}'
    random = {n: paper.of_experts(n, random_plain, setting) for n in counts}
    half = f'half of the experts copied, {plain}'
    branches = {label: paper.upcycled(**paper.experts(n, setting), **ablation) for n, label in copied.items()}
    branches |= {
        label: paper.upcycled('surgery/random.gin', **paper.experts(n, setting), **ablation)
        for n, label in random.items()
    }
    branches[half] = paper.upcycled('surgery/random.gin', RANDOM_COPIED=setting.num_experts // 2, **ablation)
    branches['dense continuation'] = paper.CONTINUATION
    panel = paper.Panel(setting, 'Figure 13: load experts', branches)
    for n in counts:
        panel.claim(f'With {n} experts, copies end ahead of random ones.', copied[n], random[n])
    few, many = counts[0], counts[-1]
    panel.claim(
        f'With {many} experts random ones end further behind copies than with {few}.',
        copied[many],
        random[many],
        than=(copied[few], random[few]),
    )
    panel.claim('Copying all experts ends ahead of copying half.', plain, half)
    panel.final('experts', {'copied': copied, 'random': random}, log=True)
    return paper.experiment('figure_13', at, [panel])
