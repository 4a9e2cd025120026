"""Measures the conversion of a Hugging Face folder to a folder with experts: speed against the disk's, and memory.

  python scripts/bench/convert_llm.py                     # 2 GB of Llama in bfloat16 to 8 experts, three times: 11 GB each
  python scripts/bench/convert_llm.py --mergekit=VENV     # also by the mergekit-moe of another virtual environment

The folder has random weights and a tokenizer. The time is that of the whole command, and everything is synced at its end. After
each conversion, the disk's rate is measured twice: that of one file of the same size, written in pieces of 8 MiB and synced, and
that of the same bytes past the page cache, as the conversion writes. Memory is the largest RSS and RssAnon of the process; the
latter leaves the page cache out. mergekit's result is compared with the dense model in float32 on a tiny folder.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax
import ml_dtypes
import numpy as np
from convert import disk_rate
from etils import epath

from upcycle.checkpoints import safetensors
from upcycle.checkpoints.direct import BUFFER, DirectFile, aligned_empty

SIZES = {'hidden_size': 2048, 'intermediate_size': 5632, 'heads': 32, 'kv_heads': 8, 'vocab_size': 32000}
TINY = {'hidden_size': 64, 'intermediate_size': 176, 'heads': 4, 'kv_heads': 2, 'vocab_size': 256}
_POOL = 1 << 24  # random numbers, from which tensors take different parts
# Runs in the environment of mergekit: the largest difference of two folders' logits.
_DIFFERENCE = """
import sys, torch
from transformers import AutoModelForCausalLM as Auto
models = [Auto.from_pretrained(path, dtype=torch.float32).eval() for path in sys.argv[1:]]
tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    dense, moe = (model(tokens).logits for model in models)
print((dense - moe).abs().max().item(), dense.abs().max().item())
"""


def make_folder(folder: pathlib.Path, layers: int, sizes: Mapping[str, int], scale: float = 0.02) -> int:
    """Writes a Llama with normal weights times `scale`, in bfloat16; returns the bytes of its weights."""
    width, mlp, vocab = sizes['hidden_size'], sizes['intermediate_size'], sizes['vocab_size']
    keys = width // sizes['heads'] * sizes['kv_heads']
    shapes = {'model.embed_tokens.weight': (vocab, width)}
    for layer in range(layers):
        inner = {
            'self_attn.q_proj': (width, width),
            'self_attn.k_proj': (keys, width),
            'self_attn.v_proj': (keys, width),
        }
        inner |= {'self_attn.o_proj': (width, width), 'mlp.gate_proj': (mlp, width), 'mlp.up_proj': (mlp, width)}
        inner |= {'mlp.down_proj': (width, mlp), 'input_layernorm': (width,), 'post_attention_layernorm': (width,)}
        shapes |= {f'model.layers.{layer}.{name}.weight': shape for name, shape in inner.items()}
    shapes |= {'model.norm.weight': (width,), 'lm_head.weight': (vocab, width)}
    folder.mkdir(parents=True)
    arrays = {name: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
    writer = safetensors.FilesWriter(epath.Path(folder), arrays)
    pool = (scale * np.random.default_rng(0).standard_normal(_POOL, np.float32)).astype(ml_dtypes.bfloat16)
    for index, (name, array) in enumerate(arrays.items()):
        parts = [pool[index * 4099 % _POOL // 2 :]] + [pool] * (array.size // _POOL + 1)
        writer.write(name, np.concatenate(parts)[: array.size].reshape(array.shape))
    writer.finish({'format': 'pt'})
    config = {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'hidden_size': width,
        'intermediate_size': mlp,
        'num_hidden_layers': layers,
        'num_attention_heads': sizes['heads'],
        'num_key_value_heads': sizes['kv_heads'],
        'vocab_size': vocab,
        'hidden_act': 'silu',
        'rms_norm_eps': 1e-5,
        'rope_theta': 10000.0,
        'max_position_embeddings': 2048,
        'tie_word_embeddings': False,
        'torch_dtype': 'bfloat16',
    }
    words = {'<unk>': 0} | {f'word{i}': i for i in range(1, vocab)}
    model = {'type': 'WordLevel', 'vocab': words, 'unk_token': '<unk>'}
    tokenizer = {'version': '1.0', 'added_tokens': [], 'pre_tokenizer': {'type': 'Whitespace'}, 'model': model}
    tokenizer |= dict.fromkeys(('truncation', 'padding', 'normalizer', 'post_processor', 'decoder'))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'unk_token': '<unk>'}
    for name, content in (('config', config), ('tokenizer', tokenizer), ('tokenizer_config', settings)):
        (folder / f'{name}.json').write_text(json.dumps(content))
    return sum(array.size * 2 for array in arrays.values())


def layers_of(size: int) -> int:
    """Returns the number of layers of a model of `size` bytes."""
    width, mlp = SIZES['hidden_size'], SIZES['intermediate_size']
    keys = width // SIZES['heads'] * SIZES['kv_heads']
    layer = 2 * width * (2 * width + 2 * keys + 3 * mlp)
    return round((size - 4 * SIZES['vocab_size'] * width) / layer)


def rate_past_cache(folder: pathlib.Path, size: int) -> float:
    """Returns the bytes/s of one file, written past the page cache in order and synced."""
    path = folder / 'sequential'
    piece = aligned_empty((BUFFER,), np.uint8)
    piece[:] = np.frombuffer(np.random.default_rng(0).bytes(BUFFER), np.uint8)
    os.sync()
    start = time.monotonic()
    file = DirectFile(epath.Path(path), piece)
    for offset in range(0, size, BUFFER):
        file.write(piece.data, offset)
    file.finish(size)
    rate = size / (time.monotonic() - start)
    path.unlink()
    os.sync()
    return rate


def run(command: Sequence[str]) -> tuple[float, int, int]:
    """Runs a command and syncs; returns seconds, the largest RSS and the largest RssAnon in bytes."""
    start, resident, anonymous = time.monotonic(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = pathlib.Path(f'/proc/{process.pid}/status')
    while process.poll() is None:
        lines = [line.split() for line in status.read_text().splitlines()] if status.exists() else []
        found = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ('VmRSS:', 'RssAnon:')}
        resident, anonymous = max(resident, found.get('VmRSS:', 0)), max(anonymous, found.get('RssAnon:', 0))
        time.sleep(0.02)
    os.sync()
    if process.returncode:
        raise SystemExit(f'failed: {" ".join(command)}')
    return time.monotonic() - start, resident, anonymous


def ours(source: pathlib.Path, target: pathlib.Path, experts: int) -> list[str]:
    """Returns our command."""
    command = [sys.executable, '-m', 'upcycle', 'convert', f'--from={source}', f'--to={target}', '--format=huggingface']
    return [*command, '--gin_file=moe/llm.gin', f'--gin.NUM_EXPERTS={experts}']


def theirs(venv: pathlib.Path, source: pathlib.Path, target: pathlib.Path, experts: int) -> list[str]:
    """Returns mergekit's command, and writes its configuration next to the target."""
    config = target.with_suffix('.json')  # JSON is YAML
    each = [{'source_model': str(source), 'positive_prompts': ['']}] * experts
    config.write_text(
        json.dumps({'base_model': str(source), 'gate_mode': 'random', 'dtype': 'bfloat16', 'experts': each})
    )
    flag = '--i-understand-this-is-not-useful-without-training'
    return [str(venv / 'bin' / 'mergekit-moe'), str(config), str(target), flag]


def measure(name: str, command: Sequence[str], target: pathlib.Path, repeat: int) -> dict[str, object]:
    """Runs a conversion several times; returns medians, and the largest memory."""
    found: dict[str, list[float]] = {}
    for _ in range(repeat):
        took, resident, anonymous = run(command)
        size = sum(file.stat().st_size for file in target.rglob('*') if file.is_file())
        shutil.rmtree(target)
        disk, past_cache = disk_rate(target.parent, size), rate_past_cache(target.parent, size)
        each = {
            'written GB': size / 1e9,
            'seconds': took,
            'MB/s': size / took / 1e6,
            'disk MB/s': disk / 1e6,
            "share of the disk's rate": size / took / disk,
            'disk past the cache MB/s': past_cache / 1e6,
            'share of the rate past the cache': size / took / past_cache,
            'RSS GB': resident / 1e9,
            'RssAnon GB': anonymous / 1e9,
        }
        for key, value in each.items():
            found.setdefault(key, []).append(value)
    worst = {key: max for key in found if key.startswith('R')}
    return {'by': name} | {key: round(worst.get(key, statistics.median)(all_), 2) for key, all_ in found.items()}


def main() -> None:
    """Parses and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--bytes', type=float, default=2e9, help='of the dense model')
    parser.add_argument('--experts', type=int, default=8)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--folder', default='.', help='on the disk to be measured')
    parser.add_argument('--mergekit', type=pathlib.Path, help='virtual environment with mergekit and transformers')
    options = parser.parse_args()
    folder = pathlib.Path(options.folder).resolve() / 'bench_convert_llm'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        dense, tiny, moe = folder / 'dense', folder / 'tiny', folder / 'moe'
        size = make_folder(dense, layers_of(int(options.bytes)), SIZES)
        print(f'dense: {size / 1e9:.2f} GB')
        print(json.dumps(measure('upcycle', ours(dense, moe, options.experts), moe, options.repeat), indent=1))
        if options.mergekit is not None:
            command = theirs(options.mergekit, dense, moe, options.experts)
            print(json.dumps(measure('mergekit-moe', command, moe, options.repeat), indent=1))
            make_folder(tiny, 4, TINY, scale=0.2)  # such that MLPs matter
            for name, command in (
                ('upcycle', ours(tiny, moe, 4)),
                ('mergekit-moe', theirs(options.mergekit, tiny, moe, 4)),
            ):
                run(command)
                compare = [str(options.mergekit / 'bin' / 'python'), '-c', _DIFFERENCE, str(tiny), str(moe)]
                difference, largest = subprocess.run(compare, check=True, capture_output=True, text=True).stdout.split()
                print(f'{name}: largest difference of logits {difference}, largest logit {largest}')
                shutil.rmtree(moe)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
    main()
