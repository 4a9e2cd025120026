"""GGUF files are read as the folders of the hub that they were made from, dequantised as the library does it."""

import re
import shutil
import struct

import gguf
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings

from tests.checkpoints import ggufs, llms, trees
from tests.checkpoints.test_damage import SETTINGS, changes, check, contents, weights
from tests.fixtures import requires_fixtures
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.gguf import container
from upcycle.errors import MissingData, UserError
from upcycle.transfer import transfer

TYPES = [
    kind.name for kind in gguf.GGMLQuantizationType if kind.name not in ('Q8_1', 'Q8_K', 'Q1_0') and kind.name[0] != 'I'
]
TYPES += [kind.name for kind in gguf.GGMLQuantizationType if kind.name.startswith('IQ')]


def blocks(kind, shape, rng):
    """Random rows: quantised by the library or, where it cannot, of random bytes with finite scales; as (stored, numbers)."""
    code = gguf.GGMLQuantizationType[kind]
    try:
        stored = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), code)
        return stored, gguf.quants.dequantize(stored, code) if kind not in ('F32', 'F16') else stored
    except NotImplementedError:
        pass
    if kind == 'F64':
        return (values := rng.standard_normal(shape)), values
    size, block_bytes = gguf.GGML_QUANT_SIZES[code]
    needed = np.prod(shape) // size
    drawn = rng.integers(0, 256, (4 * needed, block_bytes), np.uint8)
    with np.errstate(all='ignore'):
        finite = np.isfinite(gguf.quants.dequantize(drawn, code)).all(axis=1)
    stored = drawn[finite][:needed].reshape(*shape[:-1], -1)
    return stored, gguf.quants.dequantize(stored, code)


@pytest.mark.parametrize('kind', TYPES)
def test_every_type_that_the_library_dequantises(kind, tmp_path):
    rng = np.random.default_rng(0)
    stored, numbers = blocks(kind, (3, 5, 512), rng)
    row, row_numbers = blocks(kind, (1, 512), rng)
    writer = gguf.GGUFWriter(tmp_path / 'x.gguf', 'llama')
    code = gguf.GGMLQuantizationType[kind]
    raw = None if kind in ('F64', 'F32', 'F16') else code
    writer.add_tensor('x', stored, raw_dtype=raw)
    writer.add_tensor('row', row[0], raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, tensors = container.read_file(epath.Path(tmp_path / 'x.gguf'))
    x = tensors['x']
    assert (x.shape, x.kind) == ((3, 5, 512), kind)
    assert x.dtype == {'F16': 'float16', 'F64': 'float64', 'BF16': 'bfloat16'}.get(kind, 'float32')
    for region in ((), (slice(1, 2),), (slice(0, 3), slice(2, 4)), (slice(2), slice(None), slice(7, 300))):
        np.testing.assert_array_equal(np.asarray(x.read(region), numbers.dtype), numbers[region])
    np.testing.assert_array_equal(np.asarray(tensors['row'].read((slice(3, 9),)), numbers.dtype), row_numbers[0, 3:9])


def test_rows_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((7, 64)).astype(np.float32)
    file = ggufs.write(tmp_path / 'x.gguf', {'general.architecture': 'llama'}, {'x': values}, {'x': 'Q8_0'})
    _, tensors = container.read_file(epath.Path(file))
    whole = tensors['x'].read(())
    monkeypatch.setattr(container, '_READ_BYTES', 2 * 68)
    np.testing.assert_array_equal(tensors['x'].read(()), whole)
    np.testing.assert_array_equal(tensors['x'].read((slice(1, 6),)), whole[1:6])


def test_metadata_is_that_of_the_library(tmp_path):
    written = {'general.architecture': 'llama', 'a': 3, 'b': 1e-5, 'c': 'é', 'd': True, 'e': ['x', ''], 'f': [1, -2]}
    file = ggufs.write(tmp_path / 'x.gguf', written, {'x': np.ones((2, 2))})
    metadata, _ = container.read_file(epath.Path(file))
    theirs = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in metadata.items()} == {
        name: pytest.approx(value) if isinstance(value, float) else value
        for name, value in theirs.items()
        if not name.startswith('GGUF.')
    }
    assert metadata['b'] == 1e-5  # the shortest decimal of its float32


@requires_fixtures
@pytest.mark.parametrize('name', ggufs.EXPRESSIBLE)
def test_a_model_of_each_architecture(name, tmp_path):
    """The file is written with the library's names; gemma's norms are stored with 1 added."""
    folder = llms.copy(name, tmp_path / 'hub', **ggufs.EXPRESSIBLE[name])
    hub, ours = open_checkpoint(folder), open_checkpoint(ggufs.from_folder(folder, tmp_path / 'x.gguf'))
    assert ours.format == 'gguf' and ours.metadata['model'] == hub.metadata['model']
    assert ours.leaves() == hub.leaves()
    for leaf in hub.leaves():
        atol = 1e-7 if name.startswith('gemma') and leaf.endswith('scale') else 0
        np.testing.assert_allclose(ours.read(leaf), hub.read(leaf), rtol=0, atol=atol, err_msg=leaf)


@pytest.fixture
def llama(tmp_path):
    """A small model in a file: its path, and what it holds."""
    folder = llms.copy('llama', tmp_path / 'hub')
    metadata, tensors = ggufs.contents(folder)
    return tmp_path / 'x.gguf', metadata, tensors


@requires_fixtures
def test_quantised_models(llama, tmp_path):
    """Blocks of 32 numbers need wider rows than the fixture's."""
    file, metadata, tensors = llama
    rng = np.random.default_rng(0)
    wide = {'embedding_length': 64, 'attention.head_count': 4, 'attention.key_length': 16, 'attention.value_length': 16}
    metadata |= {f'llama.{key}': value for key, value in wide.items()} | {'llama.feed_forward_length': 96}
    sizes = {40: 64, 80: 96, 20: 32}
    tensors = {
        name: rng.standard_normal([sizes.get(n, n) for n in value.shape]).astype(np.float32)
        for name, value in tensors.items()
    }
    kinds = {name: 'Q4_1' for name, value in tensors.items() if value.ndim > 1}
    kinds |= {'token_embd.weight': 'Q8_0', 'output.weight': 'BF16'}
    reader = open_checkpoint(ggufs.write(file, metadata, tensors, kinds))
    dtypes = {name: leaf.dtype.name for name, leaf in reader.leaves().items()}
    assert dtypes.pop('params/decoder/logits_dense/kernel') == 'bfloat16' and set(dtypes.values()) == {'float32'}
    stored = gguf.quants.quantize(tensors['blk.1.attn_q.weight'], gguf.GGMLQuantizationType.Q4_1)
    rows = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_1).reshape(4, 8, 2, 64)
    query = rows.swapaxes(1, 2).reshape(64, 64).T
    np.testing.assert_array_equal(reader.read('params/decoder/layers_1/self_attention/query/kernel'), query)
    for dtype in ('float32', 'bfloat16'):
        path = transfer(str(file), str(tmp_path / dtype), 'upcycle', dtype=dtype)
        made = open_checkpoint(path).read('params/decoder/layers_1/self_attention/query/kernel')
        assert made.dtype == dtype
        np.testing.assert_array_equal(made, query.astype(made.dtype))


@requires_fixtures
def test_a_split_model(llama):
    file, metadata, tensors = llama
    expected = contents(ggufs.write(file, metadata, tensors))
    names = sorted(tensors)
    parts = (names[:5], names[5:])
    for i, part in enumerate(parts):
        split = {'split.no': i, 'split.count': 2, 'split.tensors.count': len(names)}
        held = (metadata if i == 0 else {'general.architecture': 'llama'}) | split
        ggufs.write(file.with_name(f'm-0000{i + 1}-of-00002.gguf'), held, {name: tensors[name] for name in part})
    first, second = (file.with_name(f'm-0000{i}-of-00002.gguf') for i in (1, 2))
    trees.assert_same(open_checkpoint(first), expected)
    with pytest.raises(UserError, match=r'is one of 2 files of a model: name the first'):
        open_checkpoint(second)
    shutil.copy(first, file.with_name('other.gguf'))
    with pytest.raises(UserError, match=r'is one of 2 files of a model: name the first'):
        open_checkpoint(file.with_name('other.gguf'))
    shutil.copy(first, second)
    with pytest.raises(UserError, match='is in another file, too'):
        open_checkpoint(first)
    second.unlink()
    with pytest.raises(UserError, match='m-00002-of-00002.gguf is missing: copy all 2 files'):
        open_checkpoint(first)


UNSUPPORTED = {
    "has the general.architecture 'mamba': only llama, ": {'general.architecture': 'mamba'},
    "general.type is 'adapter'": {'general.type': 'adapter'},
    'metadata that may change .* llama.attention.scale = 0.5': {'llama.attention.scale': 0.5},
    'llama.attention.value_length of .* is 8: supported is 10 only': {'llama.attention.value_length': 8},
    'llama.rope.dimension_count of .* is 8': {'llama.rope.dimension_count': 8},
    "llama.rope.scaling.type of .* is 'longrope'": {'llama.rope.scaling.type': 'longrope'},
    'llama.attention.head_count_kv of .* differs between layers': {'llama.attention.head_count_kv': [2, 2, 1]},
    'no llama.block_count in its metadata': {'llama.block_count': None},
    'num_hidden_layers is 2, but the arrays have 3': {'llama.block_count': 2},
}


@requires_fixtures
@pytest.mark.parametrize('message', UNSUPPORTED)
def test_what_llama_cpp_computes_and_we_do_not(message, llama):
    file, metadata, tensors = llama
    metadata = {key: value for key, value in (metadata | UNSUPPORTED[message]).items() if value is not None}
    ggufs.write(file, metadata, tensors)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(file)
    assert '\n' not in str(caught.value)


@requires_fixtures
@pytest.mark.parametrize(
    ('name', 'shape', 'message'),
    [
        ('blk.0.attn_qkv.weight', (40, 40), 'has the tensor blk.0.attn_qkv.weight, which llama does not have'),
        ('rope_freqs.weight', (5,), 'rope_freqs.weight is not the scaling of Llama 3'),
        ('blk.1.attn_q.weight', (42, 40), 'blk.1.attn_q.weight of .* does not have 4 heads'),
        ('blk.1.attn_k.weight', (40, 40), r'k_proj.weight of .*x.gguf has the shape \[40, 40\]'),
        ('blk.2.ffn_up.weight', None, 'has no model.layers.2.mlp.up_proj.weight'),
        ('token_embd.weight', None, 'has no tensor token_embd.weight'),
    ],
)
def test_other_tensors(name, shape, message, llama):
    file, metadata, tensors = llama
    tensors.pop(name, None)
    ggufs.write(file, metadata, tensors | ({} if shape is None else {name: np.full(shape, 3.0)}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(file)


@requires_fixtures
def test_per_layer_values_that_are_equal_and_a_factor_of_one(llama):
    file, metadata, tensors = llama
    expected = open_checkpoint(ggufs.write(file, metadata, tensors)).metadata
    tensors['rope_freqs.weight'] = np.ones(5)
    ggufs.write(file, metadata | {'llama.attention.head_count_kv': [2, 2, 2]}, tensors)
    assert open_checkpoint(file).metadata == expected


def header(*values, tensors=0, count=None, version=3):
    """The bytes of a header of metadata (name, code, bytes)."""
    start = b'GGUF' + struct.pack('<IQQ', version, tensors, len(values) if count is None else count)
    return start + b''.join(struct.pack('<Q', len(n)) + n + struct.pack('<I', code) + data for n, code, data in values)


DAMAGED = {
    'begins with b\'{"a"\'': b'{"a": 1}',
    'is a pointer of Git LFS': b'version https://git-lfs.github.com/spec/v1\n',
    'has version 1 of GGUF': header(version=1),
    'has version 50331648 of GGUF in little-endian order': header(version=3 << 24),
    'it ends within its header': header(count=3),
    'there is no type 77': header((b'a', 77, b'')),
    'a is there twice': header((b'a', 7, b'\1'), (b'a', 7, b'\1')),
    'a list of 4611686018427387904 strings': header((b'a', 9, struct.pack('<IQ', 8, 1 << 62))),
    'which 4611686018427387904 bytes follow': header((b'a', 9, struct.pack('<IQ', 0, 1 << 62))),
    "codec can't decode": header((b'\xff', 7, b'\1')),
    'x has 9 axes': header(tensors=1) + struct.pack('<Q1sI', 1, b'x', 9),
    'has the type 999, which the library': header(tensors=1) + struct.pack('<Q1sIQIQ', 1, b'x', 1, 1, 999, 0),
    'has the type Q8_K, which the library gguf cannot': header(tensors=1)
    + struct.pack('<Q1sIQIQ', 1, b'x', 1, 256, 15, 0),
    'rows are not blocks of 32': header(tensors=1) + struct.pack('<Q1sIQIQ', 1, b'x', 1, 33, 8, 0),
    'x ends at byte 68, but the file has 57 bytes': header(tensors=1) + struct.pack('<Q1sIQIQ', 1, b'x', 1, 1, 0, 0),
}


@pytest.mark.parametrize('message', DAMAGED)
def test_damaged_headers(message, tmp_path):
    file = tmp_path / 'x.gguf'
    file.write_bytes(DAMAGED[message])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value) and '\n' not in str(caught.value)


@requires_fixtures
def test_truncated_files_and_overlapping_tensors(llama):
    file, metadata, tensors = llama
    ggufs.write(file, metadata, tensors)
    whole = file.read_bytes()
    last = max(container.read_file(epath.Path(file))[1].values(), key=lambda each: each.offset)
    for length in (0, 3, 20, 100, len(whole) // 2, last.offset + last.nbytes - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match='is not a GGUF file, or is damaged'):
            open_checkpoint(file)
    file.write_bytes(whole + bytes(32))
    with pytest.raises(UserError, match='32 bytes belong to no tensor'):
        open_checkpoint(file)
    name = b'output_norm.weight'
    at = whole.index(name) + len(name) + 4 + 8 + 4  # of its offset, after the number of axes, its shape and its type
    file.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])
    with pytest.raises(UserError, match='begins at byte .* instead of'):
        open_checkpoint(file)


@requires_fixtures
def test_no_damage_of_a_header_is_read_as_weights(llama):
    """The format has no checksums, so changed numbers cannot be noticed: a changed header is refused, or changes nothing."""
    file, metadata, tensors = llama
    ggufs.write(file, metadata, tensors)
    expected, size = weights(contents(file)), file.stat().st_size
    end = min(each.offset for each in container.read_file(epath.Path(file))[1].values())

    @settings(SETTINGS, max_examples=30)
    @given(changes)
    def run(change):
        how, where, byte, _ = change
        if how in ('flip', 'insert'):
            where *= end / size
        elif how in ('swap', 'empty', 'delete'):
            how = 'cut'
        check(file, [file], (how, where, byte, 0), expected)

    run()


@requires_fixtures
def test_a_folder_with_a_file(llama):
    file, metadata, tensors = llama
    ggufs.write(file, metadata, tensors)
    shutil.rmtree(file.with_name('hub'))
    with pytest.raises(UserError, match=r'is not a checkpoint: name the file, .*x\.gguf'):
        open_checkpoint(file.parent)


def test_a_missing_library(tmp_path, monkeypatch):
    file = ggufs.write(tmp_path / 'x.gguf', {'general.architecture': 'llama'}, {'x': np.ones((2, 2))})
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    with pytest.raises(MissingData, match=r'x.gguf needs gguf: pip install upcycle\[gguf\]'):
        open_checkpoint(file)


@requires_fixtures
@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ['llama', 'qwen2'])
def test_the_loader_of_transformers(name, tmp_path):
    """Which has defaults for head_dim of Qwen3, query_pre_attn_scalar of Gemma and the scaling of Llama 3, so these differ."""
    torch = pytest.importorskip('torch')
    import transformers

    folder = llms.copy(name, tmp_path / 'hub', **ggufs.EXPRESSIBLE[name])
    file = ggufs.from_folder(folder, tmp_path / 'x.gguf')
    transfer(str(file), str(tmp_path / 'ours'), 'huggingface')
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, ours = (
        load(path, dtype=torch.float32, **more).eval()
        for path, more in ((tmp_path, {'gguf_file': file.name}), (tmp_path / 'ours', {}))
    )
    ids = torch.from_numpy(llms.reference(name)['input_ids'])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-4)
