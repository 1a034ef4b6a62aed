"""A run that left this package writes what it wrote inside it."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import lm_tokenizers
import numpy as np
import pytest
import small
from PIL import Image
from safetensors.numpy import load_file

from qformer_jax import cli, config
from qformer_jax.data import pictures
from qformer_jax.data.pack import BYTE_BPE
from qformer_jax.errors import UserError
from qformer_jax.export import runner
from qformer_jax.export.artifacts import PLATFORMS, artefact, write
from qformer_jax.export.functions import functions
from qformer_jax.inference import decode, quantize
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.generate import GenerationConfig
from qformer_jax.models import blip2
from qformer_jax.models.quantized import FEW_ROWS, to_flat
from qformer_jax.rules import flatten, unflatten

LMS = {
    'opt': config.OptConfig(vocab_size=60, width=16, depth=1, heads=2, mlp_width=32, max_positions=20),
    'llama': config.LlamaConfig(vocab_size=60, width=16, depth=1, heads=2, kv_heads=1, head_width=8, mlp_width=32),
    't5': config.T5Config(vocab_size=60, width=16, depth=1, decoder_depth=1, heads=2, head_width=8, mlp_width=32),
}
KINDS = {family: (family, None) for family in LMS} | {'8 bits': ('opt', 'int8')}
VIT = dataclasses.replace(small.VIT, depth=1)
QFORMER = dataclasses.replace(small.QFORMER, feature_width=16, vocab_size=60, depth=1, text_side='reads')


def drawn(model: config.Blip2Config) -> dict:
    """Return random parameters, norms and biases too."""
    draw, shapes = np.random.default_rng(0), flatten(blip2.shapes(model)).items()
    return unflatten({path: (draw.normal(size=x.shape) / 4).astype(np.float32) for path, x in shapes})


class Both:
    """A run's functions, inside and as they come back from their bytes."""

    def __init__(self, model: config.Blip2Config, weights=None):
        run = config.Run(stage='instruct', model=model, objective=config.Objective(instruction_aware=True))
        self.network, self.params = blip2.Blip2Module(model), quantize.on_device(flatten(drawn(model)).items(), weights)
        self.held = to_flat(flatten(self.params))
        self.inside = {part.name: part for part in functions(run, self.held)}
        self._outside = {}

    def outside(self, name: str) -> jax.export.Exported:
        """Return an artefact, read back from its bytes."""
        if name not in self._outside:
            self._outside[name] = jax.export.deserialize(bytearray(artefact(self.inside[name]).serialize()))
        return self._outside[name]

    def __call__(self, name: str, *inputs):
        """Return what an artefact makes of its inputs, and what the function makes of them."""
        part = self.inside[name]
        weights = {path: self.held[path] for path in part.weights}
        return tuple(jax.jit(call)(weights, *inputs) for call in (self.outside(name).call, part.call))


@pytest.fixture(scope='module', params=KINDS)
def written(request):
    family, weights = KINDS[request.param]
    return request.param, Both(config.Blip2Config(vit=None, qformer=QFORMER, lm=LMS[family]), weights)


def same(pair: tuple, tolerance: float = 0) -> tuple:
    """Return the first of two results, which must be equal."""
    assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), *pair)
    return pair[0]


@pytest.mark.parametrize('rows, length', [(1, 3), (3, 5)])
def test_an_artefact_writes_what_its_functions_write(written, rows, length):
    """Bit for bit, at sizes that it was not told of; greedily, the words of `with_lm`.

    Small weights alone sum in another order where there are one or two rows, which an artefact does not know.
    """
    kind, both = written
    tolerance = 1e-5 if kind == '8 bits' and rows <= FEW_ROWS else 0
    draw = np.random.default_rng(rows)
    prompt = draw.integers(3, 50, (rows, length)).astype(np.int32)
    prompt_mask = np.arange(length)[None] >= np.arange(rows)[:, None]
    prefix = draw.normal(size=(rows, 4, 16)).astype(np.float32)
    given = prefix, np.ones(prefix.shape[:2], bool), prompt, prompt_mask
    logits, state = same(both('prefill', *given, np.ones(4, bool)), tolerance)
    words = [logits.argmax(axis=-1).astype(np.int32)]
    while len(words) < 4:
        logits, state = same(both('step', words[-1], state), tolerance)
        words.append(logits.argmax(axis=-1).astype(np.int32))
    given = blip2.Prefix(*given[:2]), prompt, prompt_mask
    want = decode.with_lm(both.network, both.params, *given, settings=GenerationConfig(max_new_tokens=4))
    np.testing.assert_array_equal(np.stack(words, axis=1), want.tokens[:, 0])


def test_an_artefact_is_for_all_platforms_and_keeps_small_weights_small(written):
    kind, both = written
    calls = [both.outside(name) for name in ('prefill', 'step')]
    assert {call.platforms for call in calls} == {PLATFORMS}
    small_ones = [sum(x.dtype == np.int8 for x in call.in_avals) for call in calls]
    assert small_ones == ([7, 7] if kind == '8 bits' else [0, 0])


def test_encode_gives_the_prefix_of_any_number_of_rows():
    both = Both(config.Blip2Config(vit=VIT, qformer=QFORMER, lm=LMS['opt']))
    for rows, length in ((1, 4), (3, 6)):
        draw = np.random.default_rng(rows)
        image = draw.integers(0, 256, (rows, 16, 16, 3)).astype(np.uint8)
        text = draw.integers(3, 50, (rows, length)).astype(np.int32)
        prefix, whole = same(both('encode', image, text, np.ones(text.shape, bool)))
        assert prefix.shape == (rows, 4, 16) and np.ptp(prefix) > 0.1 and whole.all()


def test_texts_longer_than_the_model_are_refused():
    """4 queries and 14 tokens leave room for 3 more, of which the last is not read, in 20 positions."""
    both = Both(config.Blip2Config(vit=None, qformer=QFORMER, lm=LMS['opt']))
    prompt = np.zeros((1, 14), np.int32)
    given = np.zeros((1, 4, 16), np.float32), np.ones((1, 4), bool), prompt, prompt == 0
    assert both('prefill', *given, np.ones(3, bool))[0][0].shape == (1, 60)
    with pytest.raises(ValueError) as refused:
        both('prefill', *given, np.ones(4, bool))
    assert 'do not match the symbolic shape constraint q + t + g - 1 <= 20' in str(refused.value.__cause__)


@pytest.fixture(scope='module')
def folder(line, tmp_path_factory):
    """What the command makes of a run that answers, and what it said."""
    dest, said = tmp_path_factory.mktemp('served') / 'artefacts', io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.run(['export', str(line / 'instruct'), str(dest)])
    return dest, said.getvalue()


ALONE = """
import runpy, sys
sys.modules |= dict.fromkeys(('qformer_jax', 'flax', 'optax', 'orbax', 'jaxtyping', 'torch'))  # importing them fails
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_the_folder_serves_without_this_package(folder, line, tmp_path):
    small.draw_picture('blue', 'circle').save(tmp_path / 'picture.png')
    words = [str(folder[0] / 'run.py'), str(tmp_path / 'picture.png'), 'What color is it?']
    done = subprocess.run([sys.executable, '-I', '-c', ALONE, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = Blip2.load(line / 'instruct').ask([tmp_path / 'picture.png'], words[2:])
    assert done.stdout == f'{want[0]}\n' and want[0]


def test_the_folder_says_what_it_holds(folder, line):
    dest, said = folder
    about = json.loads((dest / 'export.json').read_text())
    assert about['fingerprint'] == json.loads((line / 'instruct' / 'run.json').read_text())['fingerprint']
    assert about['sha256'] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dest.iterdir() if path.suffix != '.json'
    } | {'byte_bpe.json': hashlib.sha256((dest / 'byte_bpe.json').read_bytes()).hexdigest()}
    assert about['functions']['prefill']['inputs']['prompt'] == 'int32[b, t]'
    state = [about['functions'][name][side]['state'] for name, side in (('prefill', 'outputs'), ('step', 'inputs'))]
    assert state[0].keys() == state[1].keys() and state[1]['valid'] == 'bool[b, s]'
    weights = load_file(dest / 'weights.safetensors')
    assert {path.split('/')[0] for path in weights} == {'vit', 'qformer', 'lm_projection', 'lm'}
    assert not [path for path in weights if 'text' in path]
    assert f'wrote {dest}' in said and f'next: python {dest / "run.py"} PICTURE "QUESTION"' in said


FLIPPED = 'flipped at the start', 'flipped in the middle', 'flipped at the end'


def damage(file: Path, how: str) -> None:
    """Change a file as a bad disk, a bad copy or a person may."""
    data = bytearray(file.read_bytes())
    if how in FLIPPED:
        data[FLIPPED.index(how) * (len(data) - 1) // 2] ^= 1
    else:
        data = {'cut': data[: len(data) // 2], 'empty': b'', 'null': b'null', 'list': b'[]', 'no UTF-8': b'\xff\xfe{}'}[
            how
        ]
    file.write_bytes(data)


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(folder[0], tmp_path / 'copied'))


def test_a_damaged_file_of_the_folder_is_named(copied):
    files = sorted(path for path in copied.iterdir() if path.name != 'run.py')
    assert len(files) == 6
    for file, how in itertools.product(files, (*FLIPPED, 'cut', 'empty', 'null', 'list', 'no UTF-8', 'missing')):
        whole = file.read_bytes()
        damage(file, how) if how != 'missing' else file.unlink()
        with pytest.raises(runner.Refused) as refused:
            runner.Served(copied)
        assert str(refused.value).startswith(f'{file}: ') and '\n' not in str(refused.value), (file, how)
        file.write_bytes(whole)
    (copied / 'more.json').write_text('{}')
    with pytest.raises(runner.Refused, match=r'more\.json: not of this export; move it elsewhere'):
        runner.Served(copied)


def test_each_byte_of_what_the_folder_says_counts(copied):
    """Blanks, the order of keys and keys that are there twice too; and what is left out or added."""
    file = copied / 'export.json'
    text, about = file.read_bytes(), json.loads(file.read_text())
    draw = np.random.default_rng(0)
    changed = []
    for place in draw.integers(len(text), size=200):
        changed.append(text[:place] + bytes([text[place] ^ 1 << draw.integers(8)]) + text[place + 1 :])
    changed += [text + b'\n', json.dumps(about).encode(), text[:-2] + b',\n "stage": "stage1"\n}', b'{' * 5000]
    for key in about:
        changed.append(json.dumps({k: v for k, v in about.items() if k != key}, indent=1).encode())
    for data in changed:
        file.write_bytes(data)
        with pytest.raises(runner.Refused, match=r'export\.json: damaged'):
            runner.checked(copied)
    file.write_bytes(text)
    assert runner.checked(copied) == {key: value for key, value in about.items() if key != 'self'}


@pytest.mark.parametrize(
    'words, message',
    [
        (['absent.png'], 'error: absent.png: no such file'),
        (['a\n' + 'b' * 300], 'error: a\\nb'),
        (['text.png', 'what?'], 'error: text.png: not a picture that is read (AVIF, BMP, '),
        (['float.tiff'], 'error: float.tiff: grey of 32 bits or floats'),
        (['folder'], 'error: folder: a folder, and this model reads one picture'),
        (['picture.png', '--where', 'x'], 'error: this model has no words for boxes'),
        (['picture.png', 'mango'], 'weights.safetensors: damaged'),
    ],
)
def test_the_command_refuses_in_one_line(copied, words, message, monkeypatch, capsys):
    monkeypatch.chdir(copied.parent)
    Path('text.png').write_text('no picture')
    Path('folder').mkdir()
    Image.fromarray(np.zeros((8, 8), np.float32)).save('float.tiff')
    small.draw_picture('blue', 'circle').save('picture.png')
    if 'mango' in words:
        damage(copied / 'weights.safetensors', FLIPPED[1])
    monkeypatch.setattr(sys, 'argv', ['run.py', *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(copied / 'run.py'), run_name='__main__')
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out
    assert len(said.err.splitlines()) == 1 and message in said.err


def test_the_loader_reads_pictures_as_the_package_does(tmp_path):
    """Turned by EXIF, of 16 bits, of a palette with transparency: the same pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        'turned.jpg': (Image.fromarray(noise), {'exif': exif}),
        'turned.png': (Image.fromarray(noise), {'exif': exif}),
        'grey.png': (Image.fromarray(noise[..., 0].astype(np.uint16) * 200), {'exif': exif}),
        'grey.tiff': (Image.fromarray(noise[..., 0].astype(np.uint16) * 200), {}),
        'grey.pgm': (Image.fromarray(noise[..., 0].astype(np.uint16) * 200), {}),
        'palette.png': (Image.fromarray(noise).quantize(9), {'transparency': bytes([0, 128, 255])}),
        'alpha.png': (Image.fromarray(noise).convert('RGBA'), {}),
        'cmyk.jpg': (Image.fromarray(noise).convert('CMYK'), {}),
    }
    for name, (image, options) in made.items():
        image.save(tmp_path / name, **options)
        computed = pictures.decode((tmp_path / name).read_bytes())
        np.testing.assert_array_equal(np.asarray(runner.upright(tmp_path / name)), np.asarray(computed), err_msg=name)
    assert runner.upright(tmp_path / 'turned.png').size == (9, 14)


@pytest.mark.parametrize(
    'array',
    [
        np.ones((2, 4), np.int32),
        np.ones((2, 3)),
        np.ones(4),
        np.ones((0, 4)),
        np.full((2, 4), np.nan),
        np.full((2, 4), 1e300),
        np.array([[1.0, None, 2.0, 3.0]]),
    ],
)
def test_the_loader_refuses_other_arrays(tmp_path, array):
    np.save(tmp_path / 'a.npy', array)
    with pytest.raises(runner.Refused, match=r'a\.npy: (expected floats|holds values that|not an \.npy array)'):
        runner.features(tmp_path / 'a.npy', 4)


def test_the_loader_refuses_what_is_no_array(tmp_path):
    np.savez(tmp_path / 'a', x=np.ones((2, 4)))
    np.save(tmp_path / 'cut.npy', np.ones((200, 4)))
    (tmp_path / 'cut.npy').write_bytes((tmp_path / 'cut.npy').read_bytes()[:500])
    for name in ('a.npz', 'cut.npy'):
        with pytest.raises(runner.Refused, match=f'{name}: not an .npy array of numbers'):
            runner.features(tmp_path / name, 4)
    with pytest.raises(runner.Refused, match=r'absent\.npy: no such file'):
        runner.features(tmp_path / 'absent.npy', 4)


def test_the_loader_reads_instructions_and_feature_arrays(line, tmp_path):
    """As the package does: questions cleaned, prompts cut, special tokens as text, arrays as they are."""
    model = Blip2.load(line / 'instruct')
    aware = small.change(model.run, 'objective', instruction_aware=True)
    model = dataclasses.replace(model, run=small.change(aware, 'model', vit=None))
    write(model, tmp_path / 'out', 'mark')
    np.save(tmp_path / 'a.npy', np.random.default_rng(0).normal(size=(3, 16)))
    served = runner.Served(tmp_path / 'out')
    question = 'Red </s>; [SEP] is it "red"? is it? '
    (prompt,) = model.question_prompts([question])
    assert prompt == model.run.data.question_prompt[0].format(question=runner.clean(question.strip(), ''))
    same((served.text(prompt), tuple(model.text_arrays([prompt]))))
    same((served.prompt(prompt, 4 + 10), model.padded_prompts([prompt], beside=4 + 10 - 1)))
    assert served.write(tmp_path / 'a.npy', question) == model.ask([tmp_path / 'a.npy'], [question])[0]
    assert served.prompt('', 4 + 10)[0].shape == (1, 8) and served.prompt('a' * 26, 4 + 10)[0].shape == (1, 27)
    assert served.write(tmp_path / 'a.npy') == model.caption([tmp_path / 'a.npy'])[0]
    with pytest.raises(runner.Refused, match='a text of 401 tokens is too long for this model'):
        served.prompt('a' * 400, 4 + 10)


def test_the_loader_writes_with_an_encoder_decoder(tmp_path):
    """T5's prompts end with a mark, it has no last position, and its state holds what its encoder made."""
    tokenizer = lm_tokenizers.t5()
    tokenizer.save(str(tmp_path / BYTE_BPE))
    lm = dataclasses.replace(LMS['t5'], vocab_size=tokenizer.get_vocab_size())
    qformer = dataclasses.replace(QFORMER, text_side='none')
    run = config.Run(stage='stage2', model=config.Blip2Config(vit=None, qformer=qformer, lm=lm))
    model = Blip2(run, drawn(run.model), tmp_path)
    write(model, tmp_path / 'out', 'mark')
    np.save(tmp_path / 'a.npy', np.random.default_rng(0).normal(size=(3, 16)))
    served, (prompt,) = runner.Served(tmp_path / 'out'), model.question_prompts(['what is it?'])
    same((served.prompt(prompt, 4 + 10), model.padded_prompts([prompt], beside=4 + 10 - 1)))
    (answer,) = model.ask([tmp_path / 'a.npy'], ['what is it?'])
    assert served.write(tmp_path / 'a.npy', 'what is it?') == answer and answer


def test_the_loader_finds_pictures(line, tmp_path):
    """As `similarity` does, on a stage-1 run; captions are cleaned in their own way."""
    model = Blip2.load(line / 'stage1')
    write(model, tmp_path / 'out', 'mark')
    small.draw_picture('blue', 'circle').save(tmp_path / 'a.png')
    served = runner.Served(tmp_path / 'out')
    texts = ['A blue circle', 'a red (square)!', 'green. \n and  yellow:blue circle red square square']
    want = model.similarity([tmp_path / 'a.png'], texts)[0]
    np.testing.assert_allclose([served.fit(tmp_path / 'a.png', text) for text in texts], want, atol=1e-6)
    assert np.ptp(want) > 0.1


def test_what_cannot_be_exported(line, tmp_path, folder):
    with pytest.raises(
        UserError, match="a 'vision' run neither writes nor finds pictures: give a run from 'stage1' on"
    ):
        cli.run(['export', str(line / 'vision'), str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()
    with pytest.raises(UserError, match='exists: name a new one'):
        cli.run(['export', str(line / 'instruct'), str(folder[0])])
