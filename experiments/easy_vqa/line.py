"""The whole line on easy-VQA: pack, pretrain two towers, stage 1, stage 2, question answering; then the official test.

Each step is a `qformer` command, printed before it runs; what is finished already is not run again.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from qformer_jax import cli
from qformer_jax.training.logs import records

STAGES = ('vision', 'language', 'stage1', 'stage2', 'instruct')
STARTS = {
    'stage1': {'vit': 'vision'},
    'stage2': {'checkpoint': 'stage1', 'lm': 'language'},
    'instruct': {'checkpoint': 'stage2'},
    'instruct_aware': {'checkpoint': 'stage2'},
    'smollm2_stage2': {'checkpoint': 'stage1', 'lm': 'smollm2'},
    'smollm2_instruct': {'checkpoint': 'smollm2_stage2'},
}


@dataclass(frozen=True)
class Line:
    """One seed's runs under `out`."""

    out: Path
    seed: int = 0

    @property
    def data(self) -> Path:
        """The packed data set, shared by the seeds."""
        return self.out / 'data'

    def run(self, stage: str) -> Path:
        """Return the folder of a stage's run."""
        return self.out / f'seed{self.seed}' / stage

    def command(self, *words: object) -> None:
        """Print a `qformer` command and run it in this process."""
        words = [str(word) for word in words]
        print(f'\n$ qformer {shlex.join(words)}', flush=True)
        cli.run(words)

    def pack(self) -> None:
        """Pack the data set, if that is not done."""
        if not self.data.exists():
            self.command('data', 'pack', 'easy-vqa', self.data)

    def train(self, stage: str, *options: object) -> None:
        """Train one stage from the runs before it."""
        starts = [
            word for part, source in STARTS.get(stage, {}).items() for word in (f'--start.{part}', self.run(source))
        ]
        self.command(
            'train', f'easy_vqa_{stage}', '--run', self.run(stage), '--data.path', self.data,
            '--training.seed', self.seed, *starts, *options,
        )  # fmt: skip

    def evaluate(self, stage: str, task: str, split: str = 'test') -> dict[str, float]:
        """Evaluate a stage's run and return the numbers."""
        self.command('evaluate', self.run(stage), '--task', task, '--split', split)
        return json.loads((self.run(stage) / 'evaluation' / f'{task}-{split}.json').read_text())['numbers']

    def seconds(self, stage: str) -> float:
        """Return the seconds that the steps of a stage took, compilation included."""
        return sum(r['timing']['seconds'] for r in records(self.run(stage)) if r['kind'] == 'train')

    def frozen_unchanged(self, stage: str) -> bool:
        """Return whether the frozen weights had the same checksum before the first and after the last step."""
        frozen = json.loads((self.run(stage) / 'finished.json').read_text())['frozen']
        return frozen['before'] == frozen['after']

    def fingerprint(self, stage: str) -> str:
        """Return the fingerprint of a stage's run."""
        return json.loads((self.run(stage) / 'run.json').read_text())['fingerprint']
