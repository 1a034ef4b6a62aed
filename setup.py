"""Package metadata; `pip install -e .` puts the command `qformer` on the path."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ['easy-vqa>=1', 'scikit-learn>=1.6']
TORCH = ['torch>=2.4', 'transformers>=5.1']
ONNX = ['onnx>=1.16']
GGUF = ['gguf>=0.17']
DEV = [
    'pytest>=8',
    'pytest-xdist>=3.6',
    'ruff>=0.9',
    'chex>=0.1.90',
    'beartype>=0.21',
    'hypothesis>=6.100',
    'nbclient>=0.10',
    'nbformat>=5.10',
    'ipykernel>=6.29',
    'resvg-py>=0.3',
]

setup(
    name='qformer_jax',
    version='0.1.0',
    description='BLIP-2 and its Q-Former in JAX: training, inference and parity with PyTorch',
    long_description=(Path(__file__).parent / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',
    packages=[*find_packages(include=['qformer_jax', 'qformer_jax.*']), 'qformer_jax.configs'],
    package_dir={'qformer_jax.configs': 'configs'},
    install_requires=[
        'jax>=0.9.2',
        'flax>=0.12.5',
        'optax>=0.2.5',
        'orbax-checkpoint>=0.11.30',
        'grain>=0.2.13',
        'array-record>=0.8',
        'tensorflow-datasets>=4.9.10',
        'numpy>=2',
        'ml_dtypes>=0.5',
        'jaxtyping>=0.3.3',
        'tyro>=1.0.16',
        'rich>=13',
        'tokenizers>=0.21',
        'safetensors>=0.5',
        'msgspec>=0.22',
        'filelock>=4',
        'flatbuffers>=24.3',  # jax.export imports it without asking for it
        'pillow>=11',
        'matplotlib>=3.10.8',
        'tensorboardX>=2.6',
        'importlib_resources>=6',  # tensorflow-datasets imports it without asking for it
    ],
    extras_require={
        'demo': DEMO,
        'torch': TORCH,
        'onnx': ONNX,
        'gguf': GGUF,
        'tpu': ['jax[tpu]>=0.9.2'],
        'dev': [*DEV, *DEMO, *TORCH, *ONNX, *GGUF],
    },
    entry_points={'console_scripts': ['qformer = qformer_jax.cli:main']},
)
