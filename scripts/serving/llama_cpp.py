"""llama.cpp as the reference: its converter, its tokens and its probabilities.

The converter is that of the source distribution of `llama-cpp-python`, which pip fetches when it is first needed. llama.cpp
itself is the wheel `xllamacpp`, and runs in another process.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence

if __name__ == '__main__':  # asked in another process
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from serving.programs import CheckError, download, run

PACKAGE, VERSION = 'llama-cpp-python', '0.3.36'
SHA256 = '832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e'
CACHE = pathlib.Path('~/.cache/upcycle').expanduser() / f'{PACKAGE}-{VERSION}'
_PARTS = ('convert_hf_to_gguf.py', 'conversion/', 'gguf-py/')
TOP = 10  # probabilities of a prompt


def source(cache: pathlib.Path = CACHE) -> pathlib.Path:
    """Returns the folder of llama.cpp's converter, which pip fetches if it is not there.

    Raises:
      CheckError: pip fails, or the file is not the one that was checked.
    """
    if (cache / _PARTS[0]).exists():
        return cache
    place = cache.with_name(f'{cache.name}.tmp')
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = download(PACKAGE, VERSION, SHA256, folder, f'--no-binary={PACKAGE}')
        with tarfile.open(archive) as files:
            for member in files:
                _, _, name = member.name.partition('/vendor/llama.cpp/')
                if member.isfile() and name.startswith(_PARTS):
                    files.extract(member.replace(name=name), place, filter='data')
    os.replace(place, cache)
    return cache


def convert(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Converts a Hugging Face folder to a GGUF file in float32 by llama.cpp's own converter.

    Raises:
      CheckError: the converter refuses the folder.
    """
    script = source() / _PARTS[0]
    run([sys.executable, str(script), str(folder), '--outfile', str(target), '--outtype=f32'])
    return target


def ask(
    model: pathlib.Path, *, texts: Sequence[str] = (), prompts: Sequence[Sequence[int]] = ()
) -> tuple[list[list[int]], list[dict[int, float]]]:
    """Asks llama.cpp, in float32.

    Args:
      model: a GGUF file.
      texts: to be tokenised, special tokens included, without BOS.
      prompts: of tokens.

    Returns:
      The tokens of each text; the log-probabilities of the most probable tokens after each prompt.

    Raises:
      CheckError: llama.cpp refuses the model.
    """
    request = {'model': str(model), 'texts': list(texts), 'prompts': [list(map(int, prompt)) for prompt in prompts]}
    answer = run([sys.executable, __file__], json.dumps(request))
    content = json.loads(answer.splitlines()[-1])
    if 'error' in content:
        raise CheckError(f'llama.cpp: {content["error"]}')
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

    # The answer has no probabilities for a token that ends the text or is a part of a character. They are those before this bias.
    forced = [[tokenize('a')[-1], 1e6]] if request['prompts'] else []

    def top(prompt: list[int]) -> dict[int, float]:
        settings = {'n_predict': 1, 'n_probs': TOP, 'temperature': 0, 'cache_prompt': False, 'logit_bias': forced}
        answer = server.handle_completions({'prompt': prompt, **settings})
        if 'choices' not in answer:
            raise RuntimeError(answer)
        (token,) = answer['choices'][0]['logprobs']['content']
        return {each['id']: each['logprob'] for each in token['top_logprobs']}

    return {
        'tokens': [tokenize(text) for text in request['texts']],
        'log_probs': [top(prompt) for prompt in request['prompts']],
    }


if __name__ == '__main__':
    try:
        content = _serve(json.load(sys.stdin))
    except Exception as error:  # xllamacpp raises plain exceptions
        content = {'error': f'{type(error).__name__}: {error}'}
    print(json.dumps(content), flush=True)
