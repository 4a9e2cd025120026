"""`upcycle quickstart`: dense pretraining, three branches and a report, on real data that needs no download.

Every run is a plain `upcycle train`; its command is printed and shown in the report.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from upcycle import api, outputs, platforms, transfer
from upcycle.commands import generate, train
from upcycle.errors import UserError
from upcycle.models.quickstart import JOBS, Job
from upcycle.report.compare import compare_seeds
from upcycle.report.html import write_report
from upcycle.report.runs import Role, Run, load_run
from upcycle.report.tables import print_table
from upcycle.sweep.paper.steps import flops_of
from upcycle.sweep.points import Point

_SAMPLE = 200  # tokens of a generated text
_SAME = 1e-5  # difference of equal logits, relative to the largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch(Point):
    """One run of the comparison, and its role."""

    role: Role


def quickstart(out: str, *, family: str = 'language', budget: float = 1.0, seeds: Sequence[int] = (0,)) -> pathlib.Path:
    """Runs or resumes the comparison and writes the report.

    Args:
      out: folder of the runs (`seed_S/BRANCH`) and of the report (`report/`).
      family: a name in `JOBS`.
      budget: multiplies the numbers of steps.
      seeds: seeds of initialisation, data order and surgery; each is a whole comparison.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: an option is wrong, or the folder holds another comparison.
    """
    if family not in JOBS:
        raise UserError(f'--family={family} is unknown: it must be one of {", ".join(JOBS)}.')
    if not 0 < budget <= 1e6:
        raise UserError(f'--budget={budget:g} must be above 0 and at most 1e6; 1 takes 20 to 50 minutes.')
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f'--seeds={",".join(map(str, seeds))} must be distinct integers of at least 0.')
    outputs.check('--out', out, outputs.Kind.FOLDER, local=True)
    platforms.devices()
    _claim(out, {'family': family, 'budget': budget})
    job = JOBS[family]
    groups, commands = [], {}
    for seed in seeds:
        group = {}
        for branch in branches(job, os.path.join(out, f'seed_{seed}'), budget, seed):
            print(f'\n$ {branch.command}', flush=True)
            if not branch.finished(int(branch.bindings['TRAIN_STEPS'])):
                train.run(branch.gin_files, branch.bindings, f'{branch.name} (seed {seed})')
            group[branch.name] = load_run(branch.model_dir, branch.role, branch.name)
            if seed == seeds[0]:
                commands[branch.name] = branch.command
        groups.append(group)
    notes = {
        'task': job.task,
        'seeds': ', '.join(map(str, seeds)),
        'budget': f'{budget:g}',
        'evaluated_on': f'{int(next(iter(groups[0].values())).split("validation")[-1]["targets"]):,} {job.counts}',
        'again': f'upcycle quickstart --family={family} --budget={budget:g} --seeds={",".join(map(str, seeds))}',
        **commands,
    }
    texts = _texts(job, groups[0])
    if job.export:
        notes['export'] = _export(job, groups[0]['upcycled'].path, os.path.join(out, f'upcycled_{job.export}'))
        print(f'\nexport: {notes["export"]}')
    page = write_report(groups, os.path.join(out, 'report'), job.title, notes, texts=texts)
    print()
    print_table(compare_seeds(groups))
    print(f'\nreport: {page}')
    return page


def _texts(job: Job, runs: Mapping[str, Run]) -> dict[str, str]:
    """Prints and returns how the model of each branch continues the prompt; {} if there is none."""
    texts = {}
    for name, run in runs.items() if job.prompt else ():
        print(f'\n{name} continues {job.prompt!r}:', flush=True)
        (result,) = generate.run(str(run.path), [job.prompt], temperature=0.7, max_new_tokens=_SAMPLE)
        texts[name] = job.prompt + result['text']
    return texts


def _export(job: Job, source: Any, target: str) -> str:
    """Writes a model in another format unless that was done, reads it back, and compares logits.

    Returns:
      What was written, and the difference.

    Raises:
      UserError: the two models compute different logits.
    """
    if not os.path.exists(target):
        transfer.transfer(str(source), target, job.export, optimizer_state='none')
    models = api.load(source), api.load(target)
    inputs = models[0][0].sample_inputs()
    ours, theirs = (np.asarray(jax.jit(model.logits)(params, inputs)) for model, params in models)
    difference = float(np.abs(ours - theirs).max())
    if not difference <= _SAME * np.abs(ours).max():
        raise UserError(f'{target} computes other logits than {source}, by up to {difference:g}: report this as a bug.')
    return f'{target}, read back: largest difference of logits {difference:.1e}'


def branches(job: Job, folder: str, budget: float, seed: int) -> list[Branch]:
    """Returns the dense run and its three branches, which all see the same batches in the same order.

    The dense continuation gets as many extra FLOPs as upcycling; MoE from scratch gets the FLOPs of the dense run and of
    upcycling together.
    """

    def make(name: str, role: Role, run: str, steps: int) -> Branch:
        is_sparse = role in (Role.UPCYCLED, Role.SCRATCH)
        files = (job.model, *((job.moe,) if is_sparse else ()), job.data, run, job.settings)
        bindings = {
            'MODEL_DIR': os.path.join(folder, name),
            'TRAIN_STEPS': str(steps),
            'RANDOM_SEED': str(seed),
            'DATA_SEED': str(seed),
        }
        if role is not Role.DENSE and job.cooldown_steps:
            bindings['COOLDOWN_STEPS'] = str(round(job.cooldown_steps * budget))
        if role in (Role.UPCYCLED, Role.DENSE_CONTINUATION):
            bindings['INITIAL_CHECKPOINT_PATH'] = os.path.join(folder, 'dense')
        if role is Role.UPCYCLED:
            bindings['UPCYCLE_SEED'] = str(seed)
        return Branch(name=name, role=role, gin_files=files, bindings=bindings)

    dense_steps = max(1, round(job.dense_steps * budget))
    upcycle_steps = max(1, round(job.upcycle_steps * budget))
    dense = make('dense', Role.DENSE, 'runs/pretrain.gin', dense_steps)
    scratch = make('scratch', Role.SCRATCH, 'runs/scratch.gin', dense_steps)
    ratio = flops_of(scratch.gin_files, scratch.bindings) / flops_of(dense.gin_files, dense.bindings)
    scratch.bindings['TRAIN_STEPS'] = str(max(1, round(dense_steps / ratio + upcycle_steps)))
    more_steps = dense_steps + max(1, round(upcycle_steps * ratio))
    continuation = make('dense_continuation', Role.DENSE_CONTINUATION, 'runs/continue_dense.gin', more_steps)
    upcycled = make('upcycled', Role.UPCYCLED, 'runs/upcycle.gin', dense_steps + upcycle_steps)
    return [dense, continuation, upcycled, scratch]


def _claim(out: str, settings: dict[str, Any]) -> None:
    path = os.path.join(out, 'quickstart.json')
    if os.path.exists(path):
        try:
            old = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
            old.items()
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f'{path} cannot be read ({error}): delete it, or name another --out.') from error
        for option, value in settings.items():
            if old.get(option, value) != value:
                raise UserError(
                    f'--out={out} holds a comparison with --{option}={old[option]}: repeat that option, or name another folder.'
                )
        return
    outputs.write('--out', path, json.dumps(settings))
