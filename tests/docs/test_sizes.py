"""Sizes of decoder-only models, as compiled: docs/llm.md and the headers of the gin files say what the CSV says."""

import runpy

import pytest

from tests.docs.pages import DOCS, ROOT
from upcycle import configuration
from upcycle.arguments import parser

SCRIPT = runpy.run_path(str(ROOT / 'scripts' / 'bench' / 'llm_sizes.py'))
ROWS = SCRIPT['rows']()
SIZES = sorted({row['model'] for row in ROWS})


def test_the_table_is_what_the_script_writes():
    table = SCRIPT['as_markdown'](ROWS)
    assert table in (DOCS / 'llm.md').read_text(encoding='utf-8'), 'run python scripts/bench/llm_sizes.py --table'


def test_dense_flops_are_those_of_cost_py():
    dense = [row for row in ROWS if row['experts'] == '0' and row['TFLOP']]
    assert dense and all(float(row['TFLOP over cost.py']) == pytest.approx(1, abs=0.03) for row in dense)


@pytest.mark.parametrize('size', SIZES)
def test_the_header_of_a_size_names_slices_and_memory(size):
    lines = (ROOT / 'gin' / 'models' / f'{size}.gin').read_text(encoding='utf-8').splitlines()
    header = ' '.join(line.removeprefix('# ') for line in lines[: lines.index('')])
    for row in ROWS:
        if row['model'] == size and row['result'] == SCRIPT['FITS']:
            form = f'{row["experts"]} experts' if row['experts'] != '0' else 'dense'
            assert f'{row["slice"]} {form}, {row["reserved, GB"]} GB' in header


@pytest.mark.parametrize('size', SIZES)
def test_the_programs_are_those_of_the_csv_and_can_be_built(size):
    programs = [program for program in SCRIPT['PROGRAMS'] if program.size == size]
    keys = [{name: row[name] for name in SCRIPT['KEY']} for row in ROWS if row['model'] == size]
    assert [program.key() for program in programs] == keys
    options, rest = parser().parse_known_args(programs[-1].arguments())
    bindings = dict(argument.removeprefix('--gin.').split('=', 1) for argument in rest)
    run = configuration.load_model(options.gin_files, bindings)
    assert run.num_experts == 8 and run.mesh_shape == (programs[-1].chips, 1, 1)
