"""Compares our logits of folders with those of transformers and llama.cpp, which must agree as well as for a dense model.

  pip install -e '.[gguf,hf,data]'
  python scripts/serve_check.py --control=dense_folder moe_folder ...   # of one vocabulary
  python scripts/serve_check.py --tiny                                  # small random models, with a SentencePiece tokenizer
  python scripts/serve_check.py --tiny --tokenizer=dense_folder         # of all layouts, with a byte-level tokenizer

transformers computes in float32 on CPUs. llama.cpp gets what its own converter makes of the folder in float32, and computes with
a float32 cache; scripts/serving/llama_cpp.py fetches the converter with pip. vLLM is not run.

Prompts are the first tokens of files of the standard library. The table has the largest difference of log-probabilities among the
10 most probable tokens after a prompt, by the length of the prompt. A folder passes if its largest difference is at most twice
that of the control, which is compared in the same run. It ends with status 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import numpy as np
from serving import llama_cpp, stdlib, tiny
from serving.programs import CheckError

LENGTHS = (1, 6, 24, 96, 192)
TEXTS = 3
ALLOWED = 2.0  # times the difference of the control
ROUNDING = 1e-5  # differences that are no sign of anything
VOCABULARY = 512  # of the small models' SentencePiece tokenizer

Tops = list[dict[int, float]]  # log-probabilities of tokens, for each prompt


def ours(folder: pathlib.Path, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Returns our log-probabilities of all tokens after each prompt."""
    import jax

    import upcycle

    model, params = upcycle.load(folder)
    apply = jax.jit(model.logits)
    with jax.default_matmul_precision('highest'):
        return [_log_softmax(apply(params, {'tokens': np.array([prompt], np.int32)})[0, -1]) for prompt in prompts]


def of_transformers(folder: pathlib.Path, prompts: Sequence[Sequence[int]]) -> Tops:
    """Returns the 10 largest log-probabilities of transformers after each prompt."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [_log_softmax(model(torch.tensor([prompt])).logits[0, -1].numpy()) for prompt in prompts]
    return [{int(i): float(row[i]) for i in np.argsort(-row)[: llama_cpp.TOP]} for row in rows]


def of_llama_cpp(folder: pathlib.Path, prompts: Sequence[Sequence[int]]) -> Tops:
    """Returns the 10 largest log-probabilities of llama.cpp after each prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        model = llama_cpp.convert(folder, pathlib.Path(scratch) / 'model.gguf')
        return llama_cpp.ask(model, prompts=prompts)[1]


ENGINES: Mapping[str, Callable[[pathlib.Path, Sequence[Sequence[int]]], Tops]] = {
    'transformers': of_transformers,
    'llama.cpp': of_llama_cpp,
}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def prompts_of(folder: pathlib.Path, lengths: Sequence[int]) -> dict[int, list[list[int]]]:
    """Returns prompts by their length: the first tokens of texts, by the folder's tokenizer."""
    from upcycle.data.causal.tokenizers import open_tokenizer

    tokenizer = open_tokenizer(folder)
    texts = [text for text in stdlib.read()[0] if len(text) > 20 * max(lengths)][:TEXTS]
    if len(texts) < TEXTS:
        raise CheckError('this version of Python has too few of the files of scripts/serving/stdlib_files.json.')
    rows = [ids.tolist() for ids in tokenizer.encode(texts)]
    return {length: [row[:length] for row in rows] for length in lengths}


def differences(
    engine: str, folder: pathlib.Path, prompts: Mapping[int, list[list[int]]], found: Sequence[np.ndarray]
) -> dict[int, float]:
    """Returns the largest difference of our log-probabilities, `found`, from an engine's, by the length of the prompt."""
    theirs = ENGINES[engine](folder, [prompt for rows in prompts.values() for prompt in rows])
    result, start = {}, 0
    for length, rows in prompts.items():
        pairs = list(zip(found, theirs, strict=True))[start : start + len(rows)]
        result[length] = float(np.max([abs(row[token] - value) for row, top in pairs for token, value in top.items()]))
        start += len(rows)
    return result  # NaN if one is


def compare(
    control: pathlib.Path, folders: Sequence[pathlib.Path], engines: Sequence[str], lengths: Sequence[int]
) -> bool:
    """Prints the rows of a table; returns whether all folders pass."""
    prompts, passed = prompts_of(control, lengths), True
    every = [prompt for rows in prompts.values() for prompt in rows]
    found = {folder: ours(folder, every) for folder in (control, *folders)}
    for engine in engines:
        allowed = None
        for folder in (control, *folders):
            try:
                by_length = differences(engine, folder, prompts, found[folder])
            except CheckError as error:
                print(f'{folder.name:<14} {engine:<13} {error}', flush=True)
                passed = False
                continue
            worst = float(np.max(list(by_length.values())))
            cells = ' '.join(f'{value:9.1e}' for value in by_length.values())
            if folder == control:
                allowed, verdict = max(ALLOWED * worst, ROUNDING), 'control'
            else:
                is_fine = allowed is not None and worst <= allowed  # False for NaN
                verdict = 'passes' if is_fine else 'FAILS'
                passed &= is_fine
            print(f'{folder.name:<14} {engine:<13} {cells}  {verdict}', flush=True)
    return passed


def compare_tiny(tokenizer: pathlib.Path | None, engines: Sequence[str], lengths: Sequence[int]) -> bool:
    """Makes small models and compares them; returns whether all pass."""
    from upcycle.data.causal.tokenizers import open_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        if tokenizer is None:
            layouts = tiny.SENTENCE_PIECE
            tokenizer = tiny.sentence_piece(place / 'tokenizer', '\n'.join(stdlib.read()[0][:10]), VOCABULARY)
        else:
            layouts = tuple(tiny.LAYOUTS)
        size = open_tokenizer(tokenizer).identity.vocabulary_size
        passed = True
        for dense in dict.fromkeys(tiny.LAYOUTS[layout][0] for layout in layouts):
            tiny.write(place / dense, dense, tiny.DENSE[dense], tokenizer, size)
            folders = [place / layout for layout in layouts if tiny.LAYOUTS[layout][0] == dense]
            for folder in folders:
                tiny.write(folder, folder.name, tiny.LAYOUTS[folder.name][1], tokenizer, size)
            passed &= compare(place / dense, folders, engines, lengths)
        return passed


def main() -> None:
    """Parses and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', type=pathlib.Path, help='folders of Hugging Face')
    parser.add_argument('--control', type=pathlib.Path, help='folder of a dense model')
    parser.add_argument('--tiny', action='store_true', help='make the folders')
    parser.add_argument('--tokenizer', type=pathlib.Path, help='of --tiny: folder with a tokenizer.json')
    parser.add_argument('--engines', default=','.join(ENGINES), help='comma-separated (%(default)s)')
    parser.add_argument('--lengths', default=','.join(map(str, LENGTHS)), help='of the prompts (%(default)s)')
    options = parser.parse_args()
    engines, lengths = options.engines.split(','), tuple(map(int, options.lengths.split(',')))
    if options.tiny == bool(options.folders) or (options.folders and options.control is None):
        parser.error('name folders and their --control, or --tiny.')
    if not set(engines) <= set(ENGINES):
        parser.error(f'--engines are {", ".join(ENGINES)}.')
    print(f'{"folder":<14} {"engine":<13} {" ".join(f"{length:>9}" for length in lengths)}')
    try:
        if options.tiny:
            passed = compare_tiny(options.tokenizer, engines, lengths)
        else:
            passed = compare(options.control, options.folders, engines, lengths)
    except CheckError as error:
        sys.exit(f'serve_check.py: {error}')
    sys.exit(not passed)


if __name__ == '__main__':
    main()
