"""Each kind of addition touches the files that docs/architecture.md says, and works: made in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = (
    (ROOT / 'docs' / 'architecture.md').read_text().partition('## What an addition touches')[2].partition('\n## ')[0]
)

# Kind of addition -> file -> its text if it is new, else what stands there and what stands there afterwards
EDITS = {
    'stage': {
        'config/run.py': [("'stage2', 'instruct']", "'stage2', 'instruct', 'describe']")],
        'training/stages.py': [(
            "    'instruct': StageEntry(",
            "    'describe': StageEntry(needs=('lm',), row_format=preprocess.CAPTIONING, loss=losses.generation,\n"
            "        next_step=CAPTION, next_step_converted=CAPTION, task='caption', generates=True),\n"
            "    'instruct': StageEntry(",
        )],
    },
    'loss term': {
        'config/run.py': [(
            '    static_queries: float = ',
            "    spread: float = field(default=0.0, metadata={'later': True})\n    static_queries: float = ",
        )],
        'training/stage1_terms.py': [(
            "    LossTerm('static_queries'",
            "    LossTerm('spread', lambda aligned: aligned.out.text_embedding.var()),\n    LossTerm('static_queries'",
        )],
    },
    'decoder LM family': {
        'config/towers.py': [(
            'LmConfig = OptConfig',
            '@dataclass(frozen=True)\nclass KaraokeConfig(LlamaConfig):\n'
            "    family: Literal['karaoke'] = 'karaoke'\n\n\nLmConfig = KaraokeConfig | OptConfig",
        )],
        'config/__init__.py': [('from .towers import GatesConfig', 'from .towers import KaraokeConfig, GatesConfig')],
        'models/karaoke.py': 'from .llama import Llama\n\n\nclass Karaoke(Llama):\n    pass\n',
        'models/families.py': [
            ('from .llama import Llama\n', 'from .karaoke import Karaoke\nfrom .llama import Llama\n'),
            ("    'llama': Family(Llama),", "    'karaoke': Family(Karaoke),\n    'llama': Family(Llama),"),
        ],
        'convert/karaoke.py': 'from .llama import llama as karaoke, read_config, read_lavis, write_config\n',
        'convert/families.py': [
            ('from . import llama, opt, t5\n', 'from . import karaoke, llama, opt, t5\n'),
            (
                "    'llama': PublishedFamily(",
                "    'karaoke': PublishedFamily('KaraokeForCausalLM', karaoke.karaoke, karaoke.read_config,\n"
                "        karaoke.write_config, 'Blip2Karaoke', 'karaoke', karaoke.read_lavis),\n"
                "    'llama': PublishedFamily(",
            ),
        ],
    },
    'connector': {
        'models/connectors/every_other.py': 'import flax.linen as nn\nfrom jax.typing import DTypeLike\n\n'
        'from ... import config\n\n\nclass Connector(nn.Module):\n    config: config.ConnectorConfig\n'
        '    dtype: DTypeLike\n\n    def __call__(self, features, mask):\n'
        '        return features[:, ::2], mask[:, ::2]\n',
    },
}  # fmt: skip

# Kind of addition -> what makes a run with it of `small.recipe`, and what must hold of the finished run
USES = {
    'stage': (
        "run = dataclasses.replace(small.recipe('stage2', data, 6), stage='describe')",
        "done.run.stage == 'describe'",
    ),
    'loss term': (
        "run = small.change(small.recipe('stage1', data, 6), 'objective', spread=0.5)",
        "all('spread' in record for record in records(done.folder) if record['kind'] == 'train')",
    ),
    'decoder LM family': (
        'lm = config.KaraokeConfig(vocab_size=0, width=16, depth=1, heads=2, kv_heads=2, head_width=8, mlp_width=32, '
        "max_positions=40)\nrun = small.change(small.recipe('stage2', data, 6), 'model', lm=lm)",
        "done.run.model.lm.family == 'karaoke' and len(Blip2.load(done.folder).caption([picture])) == 1",
    ),
    'connector': (
        "other = config.ConnectorConfig(kind='every_other', feature_width=0)\n"
        "run = small.change(small.recipe('stage2', data, 6), 'model', qformer=None, connector=other)",
        'len(Blip2.load(done.folder).caption([picture])) == 1',
    ),
}

PROGRAM = """
import dataclasses, sys
from pathlib import Path
import small
import qformer_jax
from qformer_jax import Blip2, config
from qformer_jax.training import loop
from qformer_jax.training.logs import records

data, out = map(Path, sys.argv[1:])
picture = small.draw_picture('red', 'square')
assert Path(qformer_jax.__file__).is_relative_to(out), qformer_jax.__file__
{make}
done = loop.train(run, out / 'run')
assert {holds}
"""


def touched(kind: str) -> set[str]:
    """Return the files that the table names for a kind of addition."""
    row = re.search(rf'^\| {kind} \| (.*?) \|', TABLE, flags=re.MULTILINE)[1]
    return set(re.findall(r'`([\w/]+\.py)`', row))


def test_the_table_has_every_kind():
    assert re.findall(r'^\| ([\w ]+) \| `', TABLE, flags=re.MULTILINE) == list(EDITS)


def edit(path: Path, change: str | list[tuple[str, str]]) -> None:
    """Write a new file, or replace texts that stand in it once."""
    if isinstance(change, str):
        assert not path.exists()
        path.write_text(change)
        return
    text = path.read_text()
    for before, after in change:
        assert text.count(before) == 1, f'{path}: {before}'
        text = text.replace(before, after)
    path.write_text(text)


@pytest.mark.parametrize('kind', EDITS)
def test_an_addition_touches_what_the_table_says_and_works(kind, pictures, tmp_path):
    assert {re.sub(r'karaoke|every_other', 'NAME', file) for file in EDITS[kind]} == touched(kind)
    shutil.copytree(ROOT / 'qformer_jax', tmp_path / 'qformer_jax', ignore=shutil.ignore_patterns('__pycache__'))
    for file, change in EDITS[kind].items():
        edit(tmp_path / 'qformer_jax' / file, change)
    make, holds = USES[kind]
    (tmp_path / 'program.py').write_text(PROGRAM.format(make=make, holds=holds))
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / 'tests')))
    done = subprocess.run(
        [sys.executable, 'program.py', pictures, tmp_path], cwd=tmp_path, env=os.environ | {'PYTHONPATH': paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
