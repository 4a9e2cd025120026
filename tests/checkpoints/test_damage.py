"""Property-based: a checkpoint with one damaged file is refused, or read correctly."""

import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import trees
from tests.fixtures import fixtures_dir, requires_fixtures
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError
from upcycle.models import identify

SETTINGS = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def contents(path):
    """Reads every leaf after the checks of import, export and conversion."""
    reader = open_checkpoint(path)
    leaves = reader.leaves()
    identify.check(str(path), leaves, identify.facts_of(reader.metadata))
    return {name: reader.read(name) for name in leaves}


def same(left, right):
    return left.keys() == right.keys() and all(
        (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
        for a, b in ((left[name], right[name]) for name in left)
    )


def weights(found):
    """Returns what must be equal, including optimizer state and step."""
    return {name: np.asarray(value) for name, value in found.items()}


# One change to one file: (kind, position as a fraction of its length, a byte).
changes = st.tuples(
    st.sampled_from(['cut', 'flip', 'insert', 'delete', 'empty', 'swap']),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 255),
    st.integers(0, 10**6),
)


def damage(files, change):
    """Makes a change; returns a function that undoes it."""
    how, where, byte, choice = change
    file = files[choice % len(files)]
    other = files[(choice // len(files)) % len(files)]
    before, other_before = file.read_bytes(), other.read_bytes()
    at = int(where * len(before))
    if how == 'cut':
        file.write_bytes(before[:at])
    elif how == 'flip' and before:
        file.write_bytes(before[:at] + bytes([before[at] ^ byte]) + before[at + 1 :])
    elif how == 'insert':
        file.write_bytes(before[:at] + bytes([byte]) + before[at:])
    elif how == 'empty':
        file.write_bytes(b'')
    elif how == 'swap':
        file.write_bytes(other_before)
        other.write_bytes(before)
    elif how == 'delete':
        file.unlink()

    def undo():
        other.write_bytes(other_before)
        file.write_bytes(before)

    return undo


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Writes a checkpoint of each format."""
    folder = tmp_path_factory.mktemp('written')
    made = {'vit_npz': trees.write(folder / 'vit.npz', 'vit_npz', trees.vit(True, state=False))}
    for format in ('upcycle', 't5x_legacy', 't5x_orbax'):
        made[format] = trees.write(folder / format, format, trees.t5(True, state=True))
    made['huggingface'] = trees.write(folder / 'hf', 'huggingface', trees.t5(False, state=False))
    return made


def files_of(path):
    path = pathlib.Path(path)
    return [path] if path.is_file() else sorted(file for file in path.rglob('*') if file.is_file())


def check(path, files, change, expected):
    undo = damage(files, change)
    try:
        found = contents(path)
    except UserError as error:
        assert '\n' not in str(error) or 'leaves' in str(error)
    else:
        assert same(weights(found), expected), change
    finally:
        undo()


@pytest.mark.parametrize('format', ['upcycle', 't5x_legacy', 't5x_orbax', 'vit_npz'])
def test_no_damage_is_read_as_weights(format, written):
    path = written[format]
    files, expected = files_of(path), weights(contents(path))

    @SETTINGS
    @given(changes)
    def run(change):
        check(path, files, change, expected)

    run()
    assert same(weights(contents(path)), expected)


def test_safetensors_headers(written):
    """The format has no checksums, so changed bytes of arrays cannot be noticed; all other damage is."""
    path = pathlib.Path(written['huggingface'])
    file = path / 'model.safetensors'
    expected = weights(contents(path))
    header = 8 + int.from_bytes(file.read_bytes()[:8], 'little')

    @SETTINGS
    @given(changes)
    def run(change):
        how, where, byte, choice = change
        if how in ('flip', 'insert'):
            where *= header / file.stat().st_size
        elif how in ('swap', 'empty'):
            how = 'cut'
        before = file.read_bytes()
        notes_at = before.index(b'__metadata__'), before.index(b'}', before.index(b'__metadata__'))
        if how == 'flip' and notes_at[0] <= int(where * len(before)) <= notes_at[1]:
            return  # a note such as the step, not an array
        check(path, [file], (how, where, byte, 0), expected)

    run()


@requires_fixtures
@pytest.mark.parametrize('name', ['t5x_dense_legacy', 't5x_dense_orbax'])
def test_what_t5x_wrote(name, tmp_path_factory):
    """T5X's own gzip and OCDBT files. Arrays in its index are not compared, because it has no checksum."""
    folder = tmp_path_factory.mktemp(name)
    path = pathlib.Path(
        shutil.copytree(
            fixtures_dir() / name / 'checkpoint_100', folder / 'checkpoint_100', copy_function=shutil.copyfile
        )
    )
    files = [file for file in files_of(path) if file.name != 'checkpoint' and 'dataset' not in str(file)]
    expected = weights(contents(path))

    @settings(SETTINGS, max_examples=40)
    @given(changes)
    def run(change):
        check(path, files, change, expected)

    run()
