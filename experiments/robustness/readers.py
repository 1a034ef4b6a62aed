"""What is asked of a folder after a file in it was damaged: the answer as text, to be compared with the one before."""

import hashlib
import importlib.util
import io
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from qformer_jax import config
from qformer_jax.data import pipeline
from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import UserError
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.runs import run_dir
from qformer_jax.training import loop
from qformer_jax.training.stages import STAGES

SECONDS, BYTES = 20, 2 * 2**30
_QUESTION = 'what color is it?'


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b''.join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def run(home: Path) -> str:
    """Answer, rank and caption a picture with the finished run."""
    model = Blip2.load(home / 'line' / 'instruct')
    picture = [home / 'source' / 'test' / '1.png']
    scores = model.rank(picture, [_QUESTION], ['red', 'blue', 'a green circle'])
    return f'{model.ask(picture, [_QUESTION])} {model.caption(picture)} {_digest(scores)}'


def data(home: Path, name: str = 'data') -> str:
    """Read every record, both tokenizers, and a batch."""
    dataset = Dataset.open(home / name)
    said = []
    for split in dataset.splits:
        for record in dataset.source(split):
            features = b'' if record.features is None else record.features.tobytes()
            whole = record.image or b'', features, record.captions, record.questions, record.answers, record.image_id
            said.append(hashlib.sha256(repr(whole).encode()).hexdigest())
    trained = run_dir.finished(home / 'line' / 'stage1').run
    batch = next(pipeline.batches(trained, STAGES[trained.stage].row_format, dataset, 'train', training=True))
    return f'{said} {sorted(batch)} {_digest(*(batch[name] for name in sorted(batch)))} {dataset.fingerprint}'


def features(home: Path) -> str:
    """The same of the encoded data set; and whether its tower is the run's."""
    done = run_dir.finished(home / 'line' / 'vision')
    Dataset.open(home / 'features').check_tower(done.last['vit'], done.run.model.vit)
    return data(home, 'features')


def served(home: Path) -> str:
    """Answer with the exported folder."""
    spec = importlib.util.spec_from_file_location('served_run', home / 'served' / 'run.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.Served(home / 'served').write(str(home / 'source' / 'test' / '1.png'), _QUESTION)
    except module.Refused as error:  # which its command says in one line, as `qformer` does with a UserError
        raise UserError(str(error)) from None


def half(home: Path) -> str:
    """Continue the run that was stopped halfway."""
    folder = home / 'line' / 'half'
    trained = config.from_tree(run_dir.read_identity(folder).config, str(folder))
    return str(sorted(loop.train(trained, folder).last.items()))


READERS: dict[str, Callable[[Path], str]] = {
    'run': run, 'data': data, 'features': features, 'served': served, 'half': half,
}  # fmt: skip


def _serve(pipe: Connection) -> None:
    """Read what the parent asks for, and say how it went: kind and text."""
    sys.stdout = sys.stderr = io.StringIO()
    while True:
        part, home = pipe.recv()
        try:
            pipe.send(('answer', READERS[part](home)))
        except UserError as error:
            pipe.send(('refused', str(error)))
        except SystemExit as error:
            pipe.send(('refused', str(error.code)))
        except BaseException:
            pipe.send(('traceback', traceback.format_exc()))


class Reader:
    """A process that reads; a new one after each that had to be ended."""

    def __init__(self):
        self._process = None

    def __call__(self, part: str, home: Path) -> tuple[str, str]:
        if self._process is None:
            self._start()
        return self._ask(part, home)

    def _start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        self._allowed = {}

    def _ask(self, part: str, home: Path) -> tuple[str, str]:
        """Return how a reading went; it may take as much longer than the first one of its part as `SECONDS`."""
        began = time.monotonic()
        until = began + self._allowed.get(part, 300)
        self._pipe.send((part, home))
        while not self._pipe.poll(0.05):
            too_much = resident(self._process.pid) > BYTES
            if too_much or time.monotonic() > until or not self._process.is_alive():
                self._process.kill()
                self._process.join()
                self._process = None
                return 'ended', 'above 2 GiB' if too_much else f'after {SECONDS} seconds, or by itself'
        found = self._pipe.recv()
        self._allowed.setdefault(part, SECONDS + time.monotonic() - began)
        return found


def resident(process: int) -> int:
    """Return the bytes of memory of a process; 0 where there is none."""
    try:
        return int(Path(f'/proc/{process}/statm').read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0
