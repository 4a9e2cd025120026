"""Checks of the configuration: all mistakes are reported at once, by name, before anything is built."""

import enum
import inspect
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import gin
from tests import runs
from tests.small import small_t5
from upcycle import configuration, gin_files, gin_values, run_config, schema
from upcycle.commands import train
from upcycle.errors import UserError, UserErrors, mistakes_of
from upcycle.models.stack import Remat
from upcycle.models.vit import Gelu
from upcycle.moe.conventions import BalanceLoss
from upcycle.sweep import conduct
from upcycle.sweep.points import Point
from upcycle.training.optimizer import Adafactor, Optimizer
from upcycle.training.trainable import Trainable


def mistakes(files, bindings):
    with pytest.raises(UserError) as error:
        configuration.load(files, bindings)
    return mistakes_of(error.value)


def wrong(kind, **more):
    return mistakes(runs.FILES[kind], runs.bindings(kind, '/nowhere', 6, **more))


def test_all_mistakes_at_once():
    more = {
        'BATCH_SIZ': 8,
        'TRAIN_STEPS': 'many',
        'EVAL_PERIOD': -1,
        'TASK_FEATURE_LENGTHS': "{'inputs': 'x'}",
        'NUM_HEADS': 0,
        'REMAT': 'some',
        'NUM_EXPERTS': 2.5,
        'OPTIMIZER': '@upcycle.training.optimizer.Adafacto()',
        'MODEL_DIR': '[1, 2]',
    }
    found = wrong('scratch', **more)
    assert len(found) == len(more)
    for name in more:
        assert sum(name in sentence for sentence in found) == 1, name
    assert all('\n' not in sentence for sentence in found)
    text = '\n'.join(found)
    for words in (
        'did you mean BATCH_SIZE?',
        "TRAIN_STEPS = 'many' must be a whole number of at least 1.",
        'NUM_EXPERTS = 2.5 must be a whole number',
        "REMAT = 'some' must be one of none, minimal, exchange, full.",
        'did you mean upcycle.training.optimizer.Adafactor?',
        'MODEL_DIR = [1, 2] must be a string.',
    ):
        assert words in text


class TestSettingsOfOtherRouters:
    """A recipe sets the fields of every router; what a user sets must be a field of a chosen router."""

    ALL_DENSE = {'ENCODER_ROUTER': 'dense', 'DECODER_ROUTER': 'dense'}

    @pytest.mark.parametrize(
        ('kind', 'more', 'words'),
        [
            ('scratch', {'ENCODER_FILL_ORDER': 'token_major'}, "'top_k' or 'dense' only, and the MoE layers have expert_choice:"),
            ('scratch', {'SLOTS_PER_EXPERT': 1}, "'soft' only, and the MoE layers have expert_choice, top_k:"),
            ('scratch', {'INFERENCE_THRESHOLD': 0.1}, "'dense' only"),
            ('scratch', {'DECODER_MOE_LAYERS': 'none', 'BALANCE_BIAS_RATE': 0.1}, 'and the MoE layers have expert_choice:'),
            ('scratch', {**ALL_DENSE, 'BALANCE_LOSS': 'switch'}, "'top_k' only"),
            ('scratch', {**ALL_DENSE, 'DEFAULT_OUTPUT_DECAY': 0.9}, "'top_k' only, and the MoE layers have dense:"),
            ('scratch', {'encoder/MoEConfig.gate_noise': 1.0}, "'top_k' only, and the MoE layers have expert_choice:"),
            ('vit scratch', {'BALANCE_BIAS_RATE': 0.001}, "'top_k' only"),
            ('vit scratch', {'ADAPTIVE_BALANCE': None}, "'top_k' only"),
            ('vit scratch', {'BALANCE_LOSS': 'mutual_information'}, "'top_k' only"),
            ('vit scratch', {'GATE_NOISE': 1.0}, "'top_k' only"),
            ('vit scratch', {'ROUTER_SCORES': 'sigmoid'}, "'top_k' only"),
            ('vit scratch', {'ROUTED_WEIGHT_SCALE': 2.0}, "'top_k' only"),
            ('scratch', {**ALL_DENSE, 'SCORE_GROUPS': 2}, "'top_k' only"),
            ('vit scratch', {'NUM_SELECTED_EXPERTS': 1}, "'top_k' or 'dense' only"),
            ('vit scratch', {'ROUTER': 'soft', 'GROUP_IMAGES': 1, 'DISPATCH': 'ragged'}, 'and the MoE layers have soft:'),
            ('vit scratch', {'ROUTER': 'soft', 'GROUP_IMAGES': 1, 'ROUTER_LOGIT_NORMALIZATION': 1.0}, 'have soft:'),
            ('vit scratch', {'ROUTER': 'merged', 'DISPATCH': 'ragged'}, 'and the MoE layers have merged:'),
        ],
    )  # fmt: skip
    def test_are_refused_by_name(self, kind, more, words):
        (found,) = wrong(kind, **more)
        name = list(more)[-1]
        assert found.startswith(f'--gin.{name}={more[name]} is read by the router ') and words in found

    @pytest.mark.parametrize(
        ('kind', 'more'),
        [
            ('scratch', {'ENCODER_ROUTER': 'soft', 'GROUP_SIZE': 32, 'SLOTS_PER_EXPERT': 4, 'BALANCE_BIAS_RATE': 0.1}),
            ('scratch', {**ALL_DENSE, 'BALANCE_LOSS': 'mutual_information', 'INFERENCE_THRESHOLD': 0.1}),
            ('scratch', {'DECODER_FILL_ORDER': 'choice_major'}),
            ('scratch', {'GATE_NOISE': 1.0}),
            ('vit scratch', {'ROUTER': 'top_k', 'GATE_NOISE': 1.0, 'NUM_SELECTED_EXPERTS': 3}),
        ],
    )  # fmt: skip
    def test_are_read_by_one_that_was_chosen(self, kind, more):
        runs.build(kind, '/nowhere', 6, **more)

    def test_merged_layers_are_run_with_the_files_that_trained_them(self):
        files = (*runs.FILES['vit scratch'], 'recipes/shared_experts.gin', 'recipes/merged.gin')
        bindings = runs.bindings('vit scratch', '/nowhere', 6)
        configuration.load(files, bindings)
        (found,) = mistakes((*files[:-1], 'recipes/loss_free_balancing.gin', files[-1]), bindings)
        assert found.startswith("BALANCE_BIAS_RATE = 0.001 is read by the router 'top_k' only")

    @pytest.mark.parametrize(('line', 'refused'), [
        ('SLOTS_PER_EXPERT = 1', False),
        ('SLOTS_PER_EXPERT = 2', True),
        ('MINE = 2\nSLOTS_PER_EXPERT = %MINE', True),
        ("FILL_ORDER = 'priority'", False),
        ("FILL_ORDER = 'choice_major'", True),
        ('moe.MoEConfig.slots_per_expert = 2', True),
        ('moe.MoEConfig.slots_per_expert = 1', False),
    ])  # fmt: skip
    def test_in_a_file_have_the_recipes_value(self, tmp_path, line, refused):
        path = tmp_path / 'mine.gin'
        path.write_text(f'from __gin__ import dynamic_registration\nfrom upcycle.moe import config as moe\n{line}\n')
        files, bindings = (*runs.FILES['vit scratch'], str(path)), runs.bindings('vit scratch', '/nowhere', 6)
        if not refused:
            configuration.load(files, bindings)
            return
        (found,) = mistakes(files, bindings)
        assert ' only, and the MoE layers have expert_choice: remove it' in found


def test_impossible_combinations_are_all_said():
    more = {'ENCODER_ROUTER': 'top_k', 'NUM_SELECTED_EXPERTS': 9, 'SHARED_WEIGHTS': 'xft'}
    found = wrong('scratch', **more)
    assert [sentence.split(' ')[0] for sentence in found] == ['SHARED_WEIGHTS', 'NUM_SELECTED_EXPERTS']


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        (
            {'MODEL': '@upcycle.training.optimizer.Adafactor()'},
            'MODEL = @upcycle.training.optimizer.Adafactor() must be an object of type Model',
        ),
        (
            {'OPTIMIZER': '@upcycle.training.optimizer.Adafactor'},
            'OPTIMIZER = @upcycle.training.optimizer.Adafactor must be an object of type Optimizer (@NAME())',
        ),
        ({'DATA_SEED': '%RANDOM_SED'}, 'RANDOM_SED is not set (did you mean RANDOM_SEED?)'),
        ({'DATA_SEED': '%DATA_SEED'}, 'DATA_SEED refers to itself'),
        ({'DATA_SEED': True}, 'DATA_SEED = True must be a whole number of at least 0'),
        ({'DATA_SEED': 2**31}, 'DATA_SEED = 2147483648 (beyond 2147483647, the largest whole number) must be a whole'),
        (
            {'BASE_LEARNING_RATE': 2**31},
            'BASE_LEARNING_RATE = 2147483648 (beyond 2147483647, the largest whole number) must',
        ),
        ({'BASE_LEARNING_RATE': '1e999'}, 'BASE_LEARNING_RATE = inf must be a number'),
        ({'DROPOUT_RATE': 1}, 'DROPOUT_RATE = 1 must be a number in [0, 1)'),
        ({'SCAN_LAYERS': 1}, 'SCAN_LAYERS = 1 must be True or False'),
        ({'upcycle.training.run.Run.sed': 1}, 'upcycle.training.run.Run has no parameter sed (did you mean seed?)'),
        ({'\tupcycle.training.run.Run.seed': 1}, "binds '\\tupcycle.training.run.Run.seed', which is not a name"),
        ({'DATA SEED': 1}, "binds 'DATA SEED', which is not a name"),
        (
            {'TASK_FEATURE_LENGTHS': {}},
            "TASK_FEATURE_LENGTHS = {} must have both 'inputs' and 'targets'",
        ),
        (
            {'upcycle.training.rum.Run.seed': 1},
            'upcycle.training.rum.Run is unknown (did you mean upcycle.training.run.Run?)',
        ),
    ],
)
def test_one_mistake(more, words):
    found = wrong('dense', **more)
    assert any(words in sentence for sentence in found), found


def test_a_missing_file_names_the_nearest_and_what_it_would_have_set():
    found = mistakes((runs.TINY, 'tasks/stdlib_span_coruption.gin', 'runs/pretrain.gin'), {'MODEL_DIR': 'x'})
    text = '\n'.join(found)
    assert 'did you mean tasks/stdlib_span_corruption.gin?' in text
    assert 'TRAIN_STEPS is not set: this run needs it' in text
    assert 'TRAIN_DATASET is not set: add --gin_file=tasks/' in text


def test_mistakes_in_a_file_name_its_lines(tmp_path):
    path = tmp_path / 'mine.gin'
    path.write_text(
        'from __gin__ import dynamic_registration\n'
        'from upcycle.training import optimiser\n'
        'from upcycle.moe import config as moe\n'
        'BATCH_SIZ = 8\n'
        'MY_OWN = 4\n'
        'EVAL_STEPS = %MY_OWN\n'
        'moe.MoEConfg.num_experts = 3\n'
        'moe.MoEConfig:\n'
        '  num_expert = 3\n'
        '  router = @moe.nothing()\n'
        "include 'runs/pretrian.gin'\n"
        f"include '{path}'\n"
        'NUM_EXPERTS = [1,\n'
    )
    found = mistakes((*runs.FILES['dense'], str(path)), runs.bindings('dense', '/nowhere', 6))
    for line, words in (
        (2, 'upcycle.training.optimiser cannot be imported (did you mean upcycle.training.optimizer?)'),
        (4, 'BATCH_SIZ is unused (did you mean BATCH_SIZE?)'),
        (7, 'moe.MoEConfg is unknown (did you mean moe.MoEConfig?)'),
        (9, 'moe.MoEConfig has no parameter num_expert (did you mean num_experts?)'),
        (10, 'moe.nothing is unknown'),
        (11, 'runs/pretrian.gin does not exist (did you mean runs/pretrain.gin?)'),
        (12, 'includes itself'),
    ):
        assert any(f'mine.gin, line {line}: ' in sentence and words in sentence for sentence in found), (line, found)
    assert any('mine.gin' in sentence and 'does not parse' in sentence for sentence in found)
    assert len(found) == 8


def endless(inner):
    """A configurable with an unknown return type."""
    return inner


def test_a_configurable_that_refers_to_itself(tmp_path):
    path = tmp_path / 'mine.gin'
    lines = ['from __gin__ import dynamic_registration', 'from tests import test_configuration']
    lines += [
        'test_configuration.endless.inner = @test_configuration.endless()',
        'MODEL = @test_configuration.endless()',
    ]
    path.write_text('\n'.join(lines))
    found = mistakes((*runs.FILES['dense'], str(path)), runs.bindings('dense', '/nowhere', 6))
    assert found == ('@tests.test_configuration.endless refers to itself: bind something else.',)


def test_a_scope_that_would_be_inherited_is_asked_for(tmp_path):
    path = tmp_path / 'mine.gin'
    path.write_text(
        'from __gin__ import dynamic_registration\nfrom upcycle.data import images\ntrain/images.Mnist5k.x = 3\n'
        'train/images.InceptionPreprocessing.flip = 0.3\n'
    )
    files = ('models/vit_mini.gin', 'tasks/image_folder.gin', 'runs/pretrain.gin', str(path))
    small = {'MODEL_DIR': 'x', 'TRAIN_STEPS': '1', 'NUM_CLASSES': '3', 'TRAIN_FOLDER': '/nowhere', 'PATCH_SIZE': '14'}
    found = '\n'.join(mistakes(files, small))
    assert 'images.Mnist5k has no parameter x.' in found
    assert 'refer to it as @train/InceptionPreprocessing().' in found


def test_nothing_looks_for_a_device():
    """JAX is set to a platform that does not exist, and would fail."""
    arguments = [
        'train',
        *(f'--gin_file={file}' for file in runs.FILES['dense']),
        '--gin.TRAIN_STEPS=0',
        '--gin.EVAL_STEPS=0',
    ]
    done = subprocess.run(
        [sys.executable, '-m', 'upcycle', *arguments],
        env={**os.environ, 'JAX_PLATFORMS': 'nowhere'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    for name in ('MODEL_DIR is not set', 'TRAIN_STEPS = 0', 'EVAL_STEPS = 0'):
        assert name in done.stderr
    assert 'Traceback' not in done.stderr and '3 mistakes' in done.stderr


def test_every_configurable_of_ours_has_types(tmp_path):
    """A type that cannot be evaluated would check nothing."""
    for name in gin_files.shipped():
        if not name.startswith('t5x/'):
            gin_files.read([name], {})
            for _, selector in gin.config._CONFIG:
                target = gin.config._REGISTRY[selector].wrapped
                if target.__module__.startswith('upcycle.'):
                    hints = {p.annotation for p in schema.parameters(target).values()}
                    assert Any not in hints and not any(isinstance(hint, str) for hint in hints), selector


@pytest.mark.parametrize(
    ('value', 'hint', 'expected'),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (float('nan'), float, False),
        (10**400, float, False),
        (2**31, float, False),
        (2.0**31, float, True),
        (0, schema.Count, False),
        ('x', schema.Count, False),
        (None, schema.Count | None, True),
        ([1, 2], tuple[int, int], True),
        ([1], tuple[int, int], False),
        ('ab', tuple[str, ...], False),
        ({'a': 1}, dict[str, int], True),
        ({1: 1}, dict[str, int], False),
        (UserErrors([]), UserError, True),
        (UserError(), UserErrors, False),
        (UserError, UserError, False),
        (UserError, type[UserError], True),
        (Adafactor(), Optimizer, True),
        (Adafactor, Optimizer, False),
        (Trainable(), Optimizer, False),
        (inspect.signature, Callable[..., Any], True),
    ],
)
def test_types(value, hint, expected):
    assert schema.fits(value, hint) is expected


def test_a_config_made_in_python_is_checked_by_the_same_types():
    with pytest.raises(UserErrors) as error:
        small_t5(emb_dim=0, remat='some', dtype='float8', encoder_moe=3)
    assert error.value.mistakes == (
        'EMBED_DIM = 0 must be a whole number of at least 1.',
        "ACTIVATION_DTYPE = 'float8' must be one of float32, bfloat16, float16.",
        "REMAT = 'some' must be one of none, minimal, exchange, full.",
        'ENCODER_MOE = 3 must be an object of type MoE (@NAME()) or None.',
    )
    config = small_t5(remat='full', mlp_activations=['relu'], encoder_moe_layers=[0])
    assert config.remat is Remat.FULL and config.mlp_activations == ('relu',) and hash(config)


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (BalanceLoss.SWITCH, "'switch'"),
        (('relu',), "('relu',)"),
        ([Gelu.TANH, 1], "['tanh', 1]"),
        ({'a': Gelu.ERF}, "{'a': 'erf'}"),
        (np.float32(0.5), '0.5'),
        (np.dtype('float32'), "'float32'"),
        (np.float32, "'float32'"),
        (jnp.bfloat16, "'bfloat16'"),
        (jnp.zeros((), jnp.bfloat16).dtype, "'bfloat16'"),
        (pathlib.Path('/a/b'), "'/a/b'"),
        (epath.Path('/a/b'), "'/a/b'"),
        (Trainable(), '@upcycle.training.trainable.Trainable()'),
        (None, 'None'),
        ("it's", '"it\'s"'),
    ],
    ids=str,
)
def test_values_are_shown_as_a_user_writes_them(value, text):
    assert schema.shown(value) == schema.written(value) == text


def members(module):
    for name, kind in vars(module).items():
        if inspect.isclass(kind) and issubclass(kind, enum.Enum) and kind.__module__ == module.__name__:
            yield from ((name, member) for member in kind)


def test_every_enum_of_ours_is_shown_so():
    for module in [module for name, module in sys.modules.items() if name.startswith('upcycle.')]:
        for name, member in members(module):
            assert schema.shown(member) == repr(member.value), name


def claim_of(tmp_path, kind='dense', **more):
    run = runs.build(kind, tmp_path / 'run', 6, **more)
    return run, configuration.resolved()


@pytest.mark.parametrize(
    ('before', 'now'),
    [
        ({'BASE_LEARNING_RATE': 1}, {'BASE_LEARNING_RATE': 1.0}),
        (
            {'TASK_FEATURE_LENGTHS': "{'inputs': 32, 'targets': 9}"},
            {'TASK_FEATURE_LENGTHS': "{'targets': 9, 'inputs': 32}"},
        ),
        ({'ENCODER_MOE_LAYERS': '(1,)'}, {'ENCODER_MOE_LAYERS': '[1]'}),
    ],
    ids=str,
)
def test_a_value_is_the_same_however_it_is_written(before, now, tmp_path):
    run_config.claim(*claim_of(tmp_path, 'scratch', **before))
    run_config.claim(*claim_of(tmp_path, 'scratch', **now), write=False)


def test_a_default_is_the_same_bound_or_not(tmp_path):
    """For each binding of a run, which an older gin file may lack."""
    run, bindings = claim_of(tmp_path, 'scratch', ENCODER_ROUTER='top_k')
    defaults = run_config.defaults_of_now()
    checked = 0
    for name, value in bindings.items():
        if value == defaults.get(name):
            fewer = {other: text for other, text in bindings.items() if other != name}
            for old, new in ((bindings, fewer), (fewer, bindings)):
                (tmp_path / 'run' / 'config.gin').unlink(missing_ok=True)
                run_config.claim(run, old)
                run_config.claim(run, new)
            checked += 1
    assert checked > 20


def began_with(tmp_path, kind='dense', changes=(), **more):
    """Writes the config.gin of a run that began with other defaults: `changes` are (parameter, old default or None)."""
    run_config.claim(*claim_of(tmp_path, kind, **more))
    path = tmp_path / 'run' / 'config.gin'
    lines = path.read_text().splitlines(keepends=True)
    first_default = next(i for i, line in enumerate(lines) if line.startswith('# Defaults'))
    for name, value in changes:
        (place,) = (i for i, line in enumerate(lines) if re.match(rf'[^=]*\b{re.escape(name)} = ', line))
        assert place > first_default, f'{name} is bound'
        lines[place] = '' if value is None else f'{lines[place].split(" = ")[0]} = {value}\n'
    path.write_text(''.join(lines))
    return path


def resumed(tmp_path, kind='dense', **more):
    run = run_config.as_it_began(claim_of(tmp_path, kind, **more)[0])
    run_config.claim(run, configuration.resolved())
    return run


def test_the_configuration_holds_every_operative_value(tmp_path):
    """Each parameter of each configurable of the run, bound or not."""
    run_config.claim(*claim_of(tmp_path, 'scratch'))
    stored = run_config._read_config(tmp_path / 'run' / 'config.gin').all
    for name in ('Adafactor.clipping_threshold', 'decoder/upcycle.moe.config.MoEConfig.min_capacity', 'Run.dense_step'):
        assert any(found.endswith(name) for found in stored), name
    missing = {
        f'{selector}.{name}'
        for selector, target, _ in gin_values.reachable()
        for name in schema.parameters(target)
        if f'{selector}.{name}' not in stored
    }
    assert not missing


@pytest.mark.parametrize(
    ('kind', 'name', 'value', 'read'),
    [
        ('dense', 'Adafactor.clipping_threshold', 0.5, lambda run: run.optimizer.clipping_threshold),
        (
            'scratch',
            'decoder/upcycle.moe.config.MoEConfig.min_capacity',
            8,
            lambda run: run.model.config.decoder_moe.min_capacity,
        ),
        ('dense', 'T5Config.float32_attention_logits', True, lambda run: run.model.config.float32_attention_logits),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_a_resumed_run_keeps_the_defaults_that_it_began_with(kind, name, value, read, tmp_path, capsys):
    path = began_with(tmp_path, kind, [(name, value)])
    for _ in range(2):
        assert read(resumed(tmp_path, kind)) == value
        said = capsys.readouterr().err
        assert (
            f'{name} keeps {value}, with which the run in {tmp_path}/run began; the default of this version is' in said
        )
        assert f'{name} = {value}\n' in path.read_text().partition('# Defaults')[2]


def test_todays_default_is_another_run_if_it_is_asked_for(tmp_path):
    began_with(tmp_path, changes=[('Adafactor.clipping_threshold', 0.5)])
    with pytest.raises(UserError, match=r'clipping_threshold is 0.5 and not 1.0'):
        resumed(tmp_path, **{'upcycle.training.optimizer.Adafactor.clipping_threshold': 1.0})


def test_what_was_bound_is_not_taken_back_by_leaving_it_out(tmp_path):
    run_config.claim(*claim_of(tmp_path, DROPOUT_RATE=0.5))
    with pytest.raises(UserError, match='dropout_rate is 0.5 and not 0.0'):
        resumed(tmp_path)


def test_an_older_configuration_takes_todays_defaults_and_says_so(tmp_path, capsys):
    run, bindings = claim_of(tmp_path)
    path = tmp_path / 'run' / 'config.gin'
    path.parent.mkdir()
    path.write_text(run_config.as_gin(bindings))
    assert resumed(tmp_path) == run
    said = capsys.readouterr().err
    assert re.search(
        r'config.gin does not hold \d+ settings, which take the defaults of this version: .* more', said
    ), said
    assert resumed(tmp_path) == run
    assert not capsys.readouterr().err


def test_a_setting_that_is_newer_than_the_run_takes_its_default_and_says_so(tmp_path, capsys):
    began_with(tmp_path, changes=[('Adafactor.clipping_threshold', None)])
    assert resumed(tmp_path).optimizer.clipping_threshold == 1.0
    assert (
        'not hold 1 settings, which take the defaults of this version: upcycle.training.opt' in capsys.readouterr().err
    )


def test_a_setting_that_exists_no_longer_is_left_alone(tmp_path):
    path = began_with(tmp_path)
    path.write_text(path.read_text() + 'upcycle.training.optimizer.Adafactor.old = 3\nupcycle.training.old.Old.x = 3\n')
    resumed(tmp_path)


def test_what_may_change_follows_the_command(tmp_path, capsys):
    """Such a setting may be bound, and unbound again."""
    began_with(tmp_path)
    assert resumed(tmp_path, LEAF_GRADIENT_NORMS=True).leaf_gradient_norms
    assert not resumed(tmp_path).leaf_gradient_norms
    assert not capsys.readouterr().err


@pytest.mark.parametrize('value', ['@os.getcwd()', '@upcycle.commands.train.run()', '[', "'x'\nimport os"])
def test_defaults_in_a_folder_are_data(value, tmp_path):
    began_with(tmp_path, changes=[('Adafactor.clipping_threshold', value)])
    with pytest.raises(UserError, match='config.gin holds defaults that are not plain data|must be a number'):
        resumed(tmp_path)


def test_every_command_that_resumes_does_so(tmp_path, monkeypatch):
    """`train`, and the check of a sweep."""
    began_with(tmp_path, changes=[('Adafactor.clipping_threshold', 0.5)])
    seen = []
    monkeypatch.setattr(train.loop, 'train', lambda start, *_: seen.append(start.run.optimizer.clipping_threshold))
    runs.train('dense', tmp_path / 'run', 6)
    assert seen == [0.5]
    point = Point(name='a', gin_files=runs.FILES['dense'], bindings=runs.bindings('dense', tmp_path / 'run', 6))
    assert [entry.point for entry in conduct.check([point])] == [point]


@pytest.mark.parametrize(
    ('more', 'kind', 'words'),
    [
        ({'DATA_SEED': 1}, 'dense', 'SyntheticText.seed is 0 and not 1'),
        (
            {'OPTIMIZER': '@optimizers/upcycle.training.optimizer.Adafactor()'},
            'dense',
            'Run.optimizer is @upcycle.training.optimizer.Adafactor() and not @optimizers/upcycle',
        ),
        ({'REMAT': 'full', 'DROPOUT_RATE': 0.5}, 'dense', 'dropout_rate is 0.0 and not 0.5'),
    ],
    ids=str,
)
def test_the_first_difference_that_is_named_is_one(more, kind, words, tmp_path):
    run_config.claim(*claim_of(tmp_path))
    with pytest.raises(UserError) as error:
        run_config.claim(*claim_of(tmp_path, kind, **more), write=False)
    assert words in str(error.value) and '<' not in str(error.value)


@pytest.mark.parametrize('more', [{'REMAT': 'full'}, {'SCAN_LAYERS': True}], ids=str)
def test_how_a_model_is_compiled_may_change(more, tmp_path):
    run_config.claim(*claim_of(tmp_path))
    run_config.claim(*claim_of(tmp_path, **more))


def test_a_dense_run_is_no_sparse_one(tmp_path):
    """The message does not name a setting of experts, which the dense run does not have."""
    run_config.claim(*claim_of(tmp_path))
    with pytest.raises(UserError, match=r'EncoderDecoderModel.\w+ is 0.0 and not 0.01|_moe is None and not @'):
        run_config.claim(*claim_of(tmp_path, 'scratch'), write=False)


@pytest.mark.parametrize('text', ['', '\0\0\0', '\udcff', 'from __gin__ import dynamic_registration\n'])
def test_a_damaged_config_is_called_so(text, tmp_path):
    run, identity = claim_of(tmp_path)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.gin').write_bytes(text.encode(errors='surrogateescape'))
    run_config.claim(run, identity, write=False)
    (tmp_path / 'run' / 'checkpoints').mkdir()
    with pytest.raises(UserError, match='checkpoints but an invalid config.gin: restore that file'):
        run_config.claim(run, identity)
    (tmp_path / 'run' / 'config.gin').unlink()
    (tmp_path / 'run' / 'config.gin').mkdir()
    with pytest.raises(UserError, match=r'config.gin cannot be read \(Is a directory\)'):
        run_config.claim(run, identity)


@pytest.mark.parametrize(
    ('files', 'first', 'second'),
    [
        (('moe/t5.gin', runs.TINY, runs.TASK, 'runs/scratch.gin'), 'moe/t5.gin', runs.TINY),
        ((runs.TASK, runs.TINY, 'moe/t5.gin', 'runs/scratch.gin'), runs.TASK, runs.TINY),
        (
            (runs.TINY, 'moe/t5.gin', runs.TASK, 'surgery/noise.gin', 'runs/upcycle.gin'),
            'surgery/noise.gin',
            'runs/upcycle.gin',
        ),
        (('optimizers/adamw.gin', runs.TINY, runs.TASK, 'runs/pretrain.gin'), 'optimizers/adamw.gin', runs.TINY),
        (
            ('moe/vit.gin', 'models/vit_mini.gin', 'tasks/mnist5k.gin', 'runs/scratch.gin'),
            'moe/vit.gin',
            'models/vit_mini.gin',
        ),
        (('runs/finetune.gin', runs.TINY, runs.TASK), 'runs/finetune.gin', runs.TINY),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '',
)
def test_files_in_an_order_in_which_one_undoes_another(files, first, second):
    found = mistakes(files, {'MODEL_DIR': 'x', 'TRAIN_STEPS': '2', 'INITIAL_CHECKPOINT_PATH': '/nowhere'})
    said = [sentence for sentence in found if 'name the files in the order models, moe, tasks, runs' in sentence]
    assert len(said) == 1 and said[0].startswith(f'{first} comes before {second}, which overrides its '), found


@pytest.mark.parametrize('folder', ['', 'models'])
def test_an_own_file_that_one_of_ours_replaces(folder, tmp_path, capsys):
    """Gives a warning, unless the name of its folder gives its place in the order."""
    own = tmp_path / folder / 'mine.gin'
    own.parent.mkdir(exist_ok=True)
    own.write_text('WARMUP_STEPS = 3\nEVAL_STEPS = 7\n')
    dense = runs.FILES['dense']
    bindings = runs.bindings('dense', '/nowhere', 6)
    del bindings['EVAL_STEPS']
    shipped = configuration.load(dense, bindings)
    capsys.readouterr()
    assert configuration.load((str(own), *dense), bindings) == shipped
    words = (
        f'warning: runs/pretrain.gin comes after {own} and replaces its EVAL_STEPS: name {own} last to use its values.'
    )
    assert (words in capsys.readouterr().err) == (not folder)
    if not folder:
        assert configuration.load((*dense, str(own)), bindings) != shipped
        assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ('bound', 'instead'),
    [
        (
            'synthetic.SyntheticText.seed',
            'train/synthetic.SyntheticText.seed or validation/synthetic.SyntheticText.seed',
        ),
        ('train/synthetic.SyntheticText.seed', None),
    ],
)
def test_a_binding_that_a_scope_replaces(bound, instead):
    bindings = runs.bindings('dense', '/nowhere', 6) | {bound: '77'}
    if instead is None:
        assert configuration.load(runs.FILES['dense'], bindings).train_data.seed == 77
    else:
        (found,) = mistakes(runs.FILES['dense'], bindings)
        assert found == f'--gin.{bound}=77 has no effect, because it is also bound in a scope: bind {instead}.'


def test_a_folder_as_a_gin_file():
    (found,) = mistakes((*runs.FILES['dense'], 'runs'), runs.bindings('dense', '/nowhere', 6))
    assert found == '--gin_file=runs is a folder: name a file in it.'


def test_an_order_that_changes_nothing_is_taken():
    """The two files set no common binding, or the command line sets it."""
    files = (runs.TINY, runs.TASK, 'moe/t5.gin', 'runs/scratch.gin')
    assert configuration.load(files, runs.bindings('scratch', '/nowhere', 6)).model.moe_layers()
    files = (runs.TASK, runs.TINY, 'runs/pretrain.gin')
    assert configuration.load(files, runs.bindings('dense', '/nowhere', 6)).model.config.vocab_size == 384


@pytest.mark.parametrize(
    ('kind', 'file', 'hint'),
    [
        ('scratch', 'moe/vit.gin', 'name moe/t5.gin instead'),
        ('dense', 'moe/vit.gin', 'name moe/t5.gin instead'),
        ('vit dense', 'moe/t5.gin', 'name moe/vit.gin instead'),
        ('dense', 'gin/moe/vit.gin', 'name moe/t5.gin instead'),
        ('dense', 'runs/finetune_vit.gin', 'name runs/finetune.gin instead'),
    ],
)
def test_a_recipe_of_another_family(kind, file, hint):
    *files, run = runs.FILES[kind]
    found = mistakes((*files, file, run), runs.bindings(kind, '/nowhere', 6, INITIAL_CHECKPOINT_PATH='/nowhere'))
    ours, other = ('vit', 't5') if kind.startswith('vit') else ('t5', 'vit')
    said = (
        f'{file.removeprefix("gin/")} is for models of the family {other}, and MODEL is of the family {ours}: {hint}.'
    )
    assert said in found, found


def test_a_model_before_another_one_of_another_family():
    files = ('models/vit_mini.gin', *runs.FILES['dense'])
    assert any(
        'models/vit_mini.gin is for models of the family vit' in sentence
        for sentence in mistakes(files, runs.bindings('dense', '/nowhere', 6))
    )


def test_a_model_needs_less_than_a_run():
    """`eval`, `convert` and `compile` require only what they read."""
    found = wrong('upcycle', MODEL_DIR='%gin.REQUIRED', TRAIN_STEPS='%gin.REQUIRED')
    assert [sentence.split()[0] for sentence in found] == ['MODEL_DIR', 'TRAIN_STEPS', 'INITIAL_CHECKPOINT_PATH']
    small = {name: value for name, value in runs.SMALL_STEPS.items() if name != 'TRAIN_STEPS'}
    run = configuration.load_model(runs.FILES['upcycle'], small)
    assert run.total_steps is None and run.initial_checkpoint_path is None and run.surgery.operator.name == 'copy'
    assert configuration.load_model(runs.FILES['upcycle'], {**small, 'TRAIN_STEPS': '7'}).total_steps == 7
    for name, value in {'TRAIN_STEPS': '0', 'NUM_HEADS': 'many', 'BATCH_SIZ': '4'}.items():
        with pytest.raises(UserError, match=f'{name} = {value}|{name}={value}|{name} = .{value}.'):
            configuration.load_model(runs.FILES['upcycle'], {**small, name: value})


def test_another_process_begins_the_run_while_this_one_looks(tmp_path, monkeypatch):
    """Process 0 may write config.gin and checkpoints between the two looks of another process."""
    run = runs.build('dense', tmp_path / 'run', 6)
    bound, read = configuration.resolved(), run_config._read_config

    def read_early(path):
        found = read(path)
        monkeypatch.undo()
        run_config.claim(run, bound)
        (tmp_path / 'run' / 'checkpoints').mkdir()
        return found

    monkeypatch.setattr(run_config, '_read_config', read_early)
    run_config.claim(run, bound, write=False)
    assert (tmp_path / 'run' / 'config.gin').exists()
