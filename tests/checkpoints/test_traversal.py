"""Property-based: an index may only name files in its folder and sizes that fit its bytes; nothing else is opened."""

import json
import pathlib
import zipfile

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import trees
from upcycle.checkpoints import json_files, open_checkpoint
from upcycle.errors import UserError

SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
pieces = st.sampled_from(['..', '.', '', '/', 'a', 'model.safetensors', '\0', '\\', 'C:', '~', 'outside'])
# Names outside the folder: with a slash, a backslash or a NUL, of a parent, or empty.
away = st.lists(pieces, min_size=1, max_size=5).map('/'.join).filter(lambda name: not json_files.is_plain_name(name))
HUGE = st.integers(2**41, 2**70)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A checkpoint of each format with an index, and a file outside that no index may name."""
    folder = tmp_path_factory.mktemp('written')
    (folder / 'outside').write_bytes(b'secret')
    t5 = trees.t5(False, state=False)
    made = {format: trees.write(folder / format, format, t5) for format in ('upcycle', 't5x_legacy', 'huggingface')}
    made['vit_npz'] = trees.write(folder / 'vit.npz', 'vit_npz', trees.vit(False, state=False))
    return {name: pathlib.Path(path) for name, path in made.items()}


@given(st.text(max_size=8))
def test_a_plain_name_lies_directly_below(name):
    if json_files.is_plain_name(name):
        assert pathlib.PurePosixPath('/folder', name).parent == pathlib.PurePosixPath('/folder')
        assert pathlib.PureWindowsPath('c:/folder').joinpath(name).name in (name, '') or ':' in name


def test_safetensors_indices(written, tmp_path):
    (tmp_path / 'config.json').write_bytes((written['huggingface'] / 'config.json').read_bytes())

    @SETTINGS
    @given(away)
    def run(name):
        index = {'weight_map': {'shared.weight': name}}
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
        with pytest.raises(UserError, match='outside its folder'):
            open_checkpoint(tmp_path)

    run()


@SETTINGS
@given(st.one_of(HUGE, st.integers(-(2**70), 1)))
def test_safetensors_headers_of_any_length(written, size):
    file = written['huggingface'] / 'model.safetensors'
    before = file.read_bytes()
    file.write_bytes((size % 2**64).to_bytes(8, 'little') + before[8:])
    try:
        with pytest.raises(UserError, match='header would be|damaged'):
            open_checkpoint(written['huggingface'])
    finally:
        file.write_bytes(before)


def test_orbax_indices(written):
    index = written['upcycle'] / 'state' / '_METADATA'
    before = index.read_text()

    @SETTINGS
    @given(away, st.integers(0, 3))
    def run(name, place):
        tree = json.loads(before)
        entry = list(tree['tree_metadata'].values())[place]
        entry['key_metadata'][-1]['key'] = name
        index.write_text(json.dumps(tree))
        with pytest.raises(UserError, match='outside its folder'):
            open_checkpoint(written['upcycle'])

    run()
    index.write_text(before)


def test_t5x_indices(written):
    (written['t5x_legacy'] / 'upcycle.json').unlink()  # which would notice any change
    index = written['t5x_legacy'] / 'checkpoint'
    before = index.read_bytes()

    @SETTINGS
    @given(away.filter(lambda name: not json_files.is_plain_name(name.rstrip('/'))))  # it names folders
    def run(name):
        tree = msgpack.unpackb(before, raw=False)
        tree['optimizer']['target']['token_embedder']['embedding']['kvstore']['path'] = name
        index.write_bytes(msgpack.packb(tree))
        with pytest.raises(UserError, match='outside its folder|damaged'):
            open_checkpoint(written['t5x_legacy'])

    run()
    index.write_bytes(before)


@SETTINGS
@given(HUGE.filter(lambda size: size < 2**63))
def test_arrays_of_any_size(written, size):
    """The array's own header says how large it is."""
    header = next((written['upcycle'] / 'state').glob('*embedding/zarr.json'))
    before = header.read_text()
    header.write_text(json.dumps(json.loads(before) | {'shape': [size, 16]}))
    try:
        with pytest.raises(UserError, match='too large|cannot be read'):
            open_checkpoint(written['upcycle']).leaves()
    finally:
        header.write_text(before)


@SETTINGS
@given(st.integers(10**6, 2**50), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_archives_of_any_size(tmp_path, size, how):
    """The directory of the archive claims the size in the header of a member."""
    file = tmp_path / 'bomb.npz'
    with zipfile.ZipFile(file, 'w', how) as archive:
        with archive.open('params/cls.npy', 'w') as member:
            np.lib.format.write_array_header_1_0(member, {'descr': '|u1', 'fortran_order': False, 'shape': (size,)})
        archive.infolist()[0].file_size += size
    with pytest.raises(UserError, match='claims|cannot be read|damaged|missing'):
        open_checkpoint(file).read('params/cls')


@SETTINGS
@given(st.integers(2**20, 2**62))
def test_chunks_of_any_size(written, size):
    """TensorStore would allocate a whole chunk, and end the process if it cannot."""
    header = next((written['upcycle'] / 'state').glob('*embedding/zarr.json'))
    before = header.read_text()
    tree = json.loads(before)
    tree['chunk_grid']['configuration']['chunk_shape'] = [size, 16]
    header.write_text(json.dumps(tree))
    try:
        with pytest.raises(UserError, match='its chunks of|cannot be read'):
            open_checkpoint(written['upcycle']).read('params/token_embedder/embedding')
    finally:
        header.write_text(before)
