"""Figure 3: quality of upcycled models after fine-tuning (arXiv 2212.05055).

x: extra cost of pretraining; y: downstream quality. The paper: upcycled models stay ahead of the dense continuation after
fine-tuning on SuperGLUE (Base and Large 1.5 to 2 points above their dense models) and on ImageNet; its curves are images.

Here the dense model, its continuation and the upcycled model are fine-tuned alike, after half of the extra budget and after all
of it. Runs are compared at equal pretraining budgets and equal fine-tuning steps. At the mini scale the language task is to fill
a gap in the standard library's source with the right keyword, over the six seeds of Figure 2; the vision task is scikit-learn's
small scans of digits.

  upcycle sweep --config=configs/figure_3.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/figure_3.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/figure_3.py --scale=full --where=print

At full scale: T5 Base with three seeds, and one of the paper's twelve ImageNet runs (all are in configs/finetune_imagenet.py).
This project has not run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    branches = {
        'dense continuation': paper.CONTINUATION,
        'dense continuation, half': paper.continuation(budget=0.5),
        'upcycled': paper.UPCYCLED,
        'upcycled, half': paper.upcycled(budget=0.5),
    }
    series = {
        'upcycled': {0.5: 'upcycled, half', 1.0: 'upcycled'},
        'dense continuation': {0.0: 'dense', 0.5: 'dense continuation, half', 1.0: 'dense continuation'},
    }
    panels = []
    for setting in (paper.setting_of('language', at), paper.setting_of('vision', at)):
        task = setting.downstream
        seeds = range(6) if at is paper.Scale.MINI and 'language' in setting.name else None
        title = f'Figure 3: {setting.name}, fine-tuned'
        panel = paper.Panel(setting, title, branches, seeds=seeds, downstream=task)
        numbers = 'SuperGLUE: 1.5 to 2 points' if 'language' in setting.name else ''
        for better, worse, paper_says in (
            ('upcycled, half', 'dense continuation, half', ''),
            ('upcycled', 'dense continuation', ''),
            ('upcycled', 'dense', numbers),
        ):
            text = f'Fine-tuned, {better} is ahead of {worse}.'
            panel.claim(text, better, worse, metric=task.metric, per_step=True, paper=paper_says)
        panel.final('extra cost of pretraining, of the whole budget', series, metrics=(task.metric,))
        panels.append(panel)
    return paper.experiment('figure_3', at, panels)
