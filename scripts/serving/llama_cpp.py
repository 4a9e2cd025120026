"""llama.cpp as the reference: its converter, its tokens and its probabilities.

The converter is that of the source distribution of `llama-cpp-python`, which pip fetches when it is first needed. llama.cpp
itself is the wheel `xllamacpp`, in this Python environment or another, and runs in another process.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence

PACKAGE, VERSION = 'llama-cpp-python', '0.3.36'
SHA256 = '832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e'
CACHE = pathlib.Path('~/.cache/upcycle').expanduser() / f'{PACKAGE}-{VERSION}'
_PARTS = ('convert_hf_to_gguf.py', 'conversion/', 'gguf-py/')
TOP = 10  # probabilities of a prompt


class CheckError(Exception):
    """A check cannot run, or fails."""


def source(cache: pathlib.Path = CACHE) -> pathlib.Path:
    """Returns the folder of llama.cpp's converter, which pip fetches if it is not there.

    Raises:
      CheckError: pip fails, or the file is not the one that was checked.
    """
    if (cache / _PARTS[0]).exists():
        return cache
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            '-m',
            'pip',
            'download',
            '--quiet',
            '--no-deps',
            '--no-binary=:all:',
            '--dest',
            folder,
        ]
        print(f'fetching {PACKAGE} {VERSION} ...', file=sys.stderr, flush=True)
        _run([*command, f'{PACKAGE}=={VERSION}'])
        (archive,) = pathlib.Path(folder).glob('*.tar.gz')
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            raise CheckError(f'{archive.name} has another SHA-256 than {SHA256}: it is not unpacked.')
        place = cache.with_name(f'{cache.name}.tmp')
        with tarfile.open(archive) as files:
            for member in files:
                _, _, name = member.name.partition('/vendor/llama.cpp/')
                if member.isfile() and name.startswith(_PARTS):
                    member.name = name
                    files.extract(member, place, filter='data')
        os.replace(place, cache)
    return cache


def convert(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Converts a Hugging Face folder to a GGUF file in float32 by llama.cpp's own converter.

    Raises:
      CheckError: the converter refuses the folder.
    """
    script = source() / _PARTS[0]
    _run([sys.executable, str(script), str(folder), '--outfile', str(target), '--outtype=f32'])
    return target


def _run(command: Sequence[str], text: str | None = None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip() or 'no message').splitlines()[-1]
        raise CheckError(f'{" ".join(command[:3])} failed: {last}')
    return result.stdout


def ask(
    model: pathlib.Path,
    *,
    texts: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] = (),
    python: str = sys.executable,
) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Asks llama.cpp, in float32.

    Args:
      model: a GGUF file.
      texts: to be tokenised, special tokens included, without BOS.
      prompts: of tokens.
      python: interpreter of an environment with xllamacpp.

    Returns:
      The tokens of each text; the log-probabilities of the most probable tokens after each prompt.

    Raises:
      CheckError: llama.cpp refuses the model.
    """
    request = {'model': str(model), 'texts': list(texts), 'prompts': [list(map(int, prompt)) for prompt in prompts]}
    answer = _run([python, __file__], json.dumps(request))
    content = json.loads(answer.splitlines()[-1])
    return content['tokens'], [{int(token): value for token, value in top.items()} for top in content['log_probs']]


def _serve(request: Mapping) -> dict:
    """Answers a request of `ask`, in an environment with xllamacpp."""
    import socket
    import urllib.request

    import xllamacpp

    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request['model']
    parameters.n_ctx = max([64, *(len(prompt) + 8 for prompt in request['prompts'])])
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.use_jinja = False
    parameters.cpuparams.n_threads = os.cpu_count()
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.hostnames, parameters.port = ['127.0.0.1'], port
    server = xllamacpp.Server(parameters)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def tokenize(text: str) -> list[int]:
        body = {'content': text, 'add_special': False, 'parse_special': True}
        post = urllib.request.Request(
            f'{server.listening_address}/tokenize',
            data=json.dumps(body).encode(),
            headers={'Content-Type': 'application/json'},
        )
        with opener.open(post) as answer:
            return json.load(answer)['tokens']

    def top(prompt: list[int]) -> dict[int, float]:
        settings = {'n_predict': 1, 'n_probs': TOP, 'temperature': 0, 'cache_prompt': False}
        answer = server.handle_completions({'prompt': prompt, **settings})
        (token,) = answer['choices'][0]['logprobs']['content']
        return {each['id']: each['logprob'] for each in token['top_logprobs']}

    return {
        'tokens': [tokenize(text) for text in request['texts']],
        'log_probs': [top(prompt) for prompt in request['prompts']],
    }


if __name__ == '__main__':
    print(json.dumps(_serve(json.load(sys.stdin))), flush=True)
