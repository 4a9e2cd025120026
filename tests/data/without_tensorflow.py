"""Every command for a tiny decoder-only model, and a resumed run, in a process that refuses TensorFlow, seqio and TFDS.

python -m tests.data.without_tensorflow FOLDER
"""

import importlib.abc
import importlib.util
import json
import shutil
import sys

REFUSED = {'tensorflow', 'seqio', 'tensorflow_datasets', 't5', 'keras'}


imported = []


class Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds these packages, as where they are installed, and refuses to load them."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.partition('.')[0] in REFUSED else None

    def exec_module(self, module):
        imported.append(module.__name__)
        raise ImportError(f'{module.__name__} is refused')


def main(folder):
    sys.meta_path.insert(0, Refuse())
    from tests import runs
    from upcycle import cli

    with open(f'{folder}/a.jsonl', 'w', encoding='utf-8') as file:
        file.writelines(json.dumps({'text': f'Document {i}, and more of it.'}) + '\n' for i in range(200))
    shards = ['--tokenizer=bytes', f'--to={folder}/shards', '--workers=1', '--validation=0.2']
    cli.run(['tokenize', f'--from={folder}/a.jsonl', *shards])
    sizes = {'NUM_LAYERS': 1, 'LOG_PERIOD': 1, 'CHECKPOINT_KEEP': 2}
    settings = runs.bindings('llm dense', f'{folder}/run', 4, TOKENS_DIR=f'{folder}/shards', **sizes)
    files = [f'--gin_file={file}' for file in (runs.LLM, 'tasks/tokens.gin', 'runs/pretrain.gin')]
    train = ['train', *files, *(f'--gin.{name}={value}' for name, value in settings.items())]
    cli.run(train)
    shutil.copy(f'{folder}/run/metrics.jsonl', f'{folder}/first.jsonl')
    shutil.rmtree(f'{folder}/run/checkpoints/4')
    cli.run(train)  # continues from step 2
    cli.run(['eval', f'--from={folder}/run', f'--out={folder}/eval.json'])
    cli.run(['generate', f'--from={folder}/run', '--prompt=Document', '--max_new_tokens=4'])
    settings |= {'MODEL_DIR': f'{folder}/other', 'TRAIN_STEPS': '6'}
    files[-1] = '--gin_file=runs/continue_dense.gin'
    cli.run(['plan', f'--from={folder}/run', *files, *(f'--gin.{name}={value}' for name, value in settings.items())])
    moe = ['--format=huggingface', '--gin_file=moe/llm.gin', '--gin.NUM_EXPERTS=2']
    cli.run(['convert', f'--from={folder}/run', f'--to={folder}/moe', *moe])
    print('imported:', imported)


if __name__ == '__main__':
    main(sys.argv[1])
