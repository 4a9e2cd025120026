"""Section 5: ablations without a figure (arXiv 2212.05055).

Vision: Gaussian noise on all weights of the copied experts, with a twentieth of their deviation or all of it; the paper: small
noise does nothing, large noise hurts. Top-2 with tokens served by probability (Batch Prioritised Routing) or first come, first
served; the paper: worse without priority. Language: combine weights normalised or raw; the paper: no gain by normalising (70.8
and 70.7, 79.3 and 78.8 on SuperGLUE), so language models do not normalise.

  upcycle sweep --config=configs/section_5.py --scale=mini --out=runs/paper
  upcycle sweep --config=configs/section_5.py --scale=compiled --out=runs/compiled
  upcycle sweep --config=configs/section_5.py --scale=full --where=print

At the mini scale, all other experiments on language normalise the weights (runs/quickstart.gin says why). This project has not
run it at full scale.
"""

from typing import Any

from upcycle.sweep import paper


def get_config(scale: str = 'mini') -> Any:
    """Returns the experiment at one of three scales."""
    at = paper.scale_of(scale)
    mini = at is paper.Scale.MINI

    vision = paper.setting_of('vision', at)
    ablation, plain = vision.ablation
    small, large = (0.01, 0.2) if mini else (0.001, 0.023)
    noisy = {
        label: paper.upcycled('surgery/noise.gin', NOISE_STDDEV=stddev, NOISE_FRACTION=1.0, **ablation)
        for label, stddev in (('small noise', small), ('large noise', large))
    }
    top_2 = {'ROUTER': 'top_k', 'NUM_SELECTED_EXPERTS': 2, **paper.capacity(1.05)}
    branches = {
        'dense continuation': paper.CONTINUATION,
        plain: paper.upcycled(**ablation),
        **noisy,
        'Top-2': paper.upcycled(**top_2),
        'Top-2, first come': paper.upcycled(FILL_ORDER='choice_major', **top_2),
    }
    of_vision = paper.Panel(vision, 'Section 5: noise, and who is served first', branches)
    of_vision.claim('Small noise changes nothing, to 0.01 nats.', 'small noise', plain, within=0.01)
    of_vision.claim('Copies end ahead of copies with large noise.', plain, 'large noise')
    of_vision.claim('Top-2 by priority ends ahead of first come.', 'Top-2', 'Top-2, first come')

    language = paper.setting_of('language', at)
    normalized, raw = ('upcycled', 'raw weights') if mini else ('normalised weights', 'upcycled')
    other = {raw: False} if mini else {normalized: True}
    branches = {'dense continuation': paper.CONTINUATION, 'upcycled': paper.UPCYCLED} | {
        label: paper.upcycled(NORMALIZE_COMBINE_WEIGHTS=value) for label, value in other.items()
    }
    of_language = paper.Panel(language, 'Section 5: combine weights of language models', branches)
    text = 'Normalised weights gain nothing over raw ones, to 0.01 nats.'
    of_language.claim(text, normalized, raw, paper='70.8 and 70.7, 79.3 and 78.8', within=0.01)
    return paper.experiment('section_5', at, [of_vision, of_language])
