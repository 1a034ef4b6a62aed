"""What `qformer` says of itself: help, version and recipes, at once and of one table; how it is called and imported."""

import errno
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import small

import qformer_jax
from qformer_jax import cli, recipes
from qformer_jax.commands import COMMANDS, GROUPS
from qformer_jax.errors import UserError, command
from qformer_jax.inference import blip2

HELP = Path(__file__).parent / 'goldens' / 'help.txt'

QUICK = """
import sys
before = set(sys.modules)
import qformer_jax
from qformer_jax import cli, errors
dir(qformer_jax), qformer_jax.__version__
good = [], ['--help'], ['-h'], ['--version'], ['data'], ['data', '--help'], ['train', '--help']
for words in [*good, ['train'], ['train', '--run', 'x'], ['trian'], ['data', 'pak']]:
    try:
        cli.run(words)
        assert words in good, words
    except errors.UserError:
        assert words not in good, words
packages = {name.partition('.')[0] for name in set(sys.modules) - before}
print('besides:', *sorted(packages - sys.stdlib_module_names))
"""


def said(capsys, *words: str) -> str:
    """Return what a command line prints."""
    capsys.readouterr()
    cli.run(list(words))
    return capsys.readouterr().out


def test_what_needs_no_model_imports_the_standard_library_alone():
    """JAX, tyro and what they bring take seconds to import; who asks for help or mistypes does not wait for them."""
    done = subprocess.run([sys.executable, '-c', QUICK], cwd=small.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'besides: qformer_jax'


def test_the_help_is_its_golden_text(capsys):
    if not HELP.exists():
        HELP.write_text(said(capsys, '--help'))
        pytest.fail(f'{HELP.name} did not exist and was written: read it and commit it')
    assert said(capsys, '--help') == said(capsys) == HELP.read_text(), (
        f'qformer --help changed; if that is meant, delete tests/goldens/{HELP.name}, run this once, read it, commit it'
    )


def test_the_help_has_every_command_once_under_its_heading(capsys):
    text = said(capsys, '--help')
    assert max(map(len, text.splitlines())) <= 120
    for title, group in GROUPS.items():
        _, _, below = text.partition(f'\n{title}\n')
        lines = below.partition('\n\n')[0].splitlines()
        assert [re.match(r'  ((?:data )?[a-z]+) ', line)[1] for line in lines] == list(group)
    assert all(len(re.findall(rf'^  {name} ', text, re.MULTILINE)) == 1 for name in COMMANDS)


@pytest.mark.parametrize('name', [name for name in COMMANDS if name != 'train'])
def test_a_command_is_called_as_the_help_says(name, capsys):
    """Its usage line names the same positional arguments, not their types; each is explained below, by that name."""
    with pytest.raises(SystemExit) as stop:
        said(capsys, *name.split(), '--help')
    assert stop.value.code == 0
    usage, text = capsys.readouterr().out.split('\n', 1)
    words = re.sub(r'--\S+ \S+', '', COMMANDS[name][1]).split()
    called = re.sub(r'\[-h\] |\[OPTIONS\] ', '', usage.removeprefix(f'usage: qformer {name} '))
    found = re.split(r' \[?--', called)[0].split()
    assert found == words
    column = ' '.join(re.findall(r'^\W ([A-Z][A-Z. ]*?)  ', text, re.MULTILINE))
    assert column.split() == words


def test_data_shows_its_commands(capsys):
    text = said(capsys, 'data')
    assert text == said(capsys, 'data', '--help') == said(capsys, 'data', '-h')
    assert re.findall(r'^  (data \w+) ', text, re.MULTILINE) == ['data pack', 'data encode']
    with pytest.raises(UserError, match=r"no command 'data encod' \(nearest: 'data encode'\); see qformer data --help"):
        cli.run(['data', 'encod'])
    with pytest.raises(UserError, match=r"no command 'data nonsense' \(nearest: 'data \w+'\)"):
        cli.run(['data', 'nonsense'])


def test_train_lists_the_recipes_without_running_them(capsys, monkeypatch):
    firsts = {name: recipes.load(name)[1].splitlines()[0] for name in recipes.names()}
    monkeypatch.setattr(recipes, 'load', lambda name: pytest.fail('a recipe was run'))
    rows = re.findall(r'^  (\w+) +(.*)$', said(capsys, 'train', '--help'), re.MULTILINE)
    assert dict(rows) == firsts and len(rows) == len(firsts)


def test_a_recipe_comes_before_the_options(capsys):
    with pytest.raises(UserError, match='needs a recipe, before --run'):
        cli.run(['train', '--run', 'runs/mine', 'easy_vqa_stage1'])


def test_the_versions(capsys):
    packages = [f'{name} {metadata.version(name)}' for name in ('qformer_jax', 'jax', 'flax')]
    assert said(capsys, '--version') == ', '.join([*packages, f'Python {platform.python_version()}\n'])
    assert qformer_jax.__version__ == metadata.version('qformer_jax')


def test_the_version_of_what_is_not_installed(capsys, monkeypatch):
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, 'version', version)
    assert said(capsys, '--version').startswith('qformer_jax not installed, jax not installed, ')


def test_the_package_has_the_model_when_it_is_named():
    from qformer_jax import Blip2

    assert Blip2 is blip2.Blip2 is qformer_jax.Blip2
    assert qformer_jax.__all__ == ['Blip2'] and {'Blip2', '__version__'} <= set(dir(qformer_jax))
    with pytest.raises(AttributeError, match="module 'qformer_jax' has no attribute 'Blip3'"):
        _ = qformer_jax.Blip3


@pytest.mark.parametrize('words', [['--help'], ['train'], ['parts']])
def test_a_pipe_that_nobody_reads_is_a_quiet_end(words):
    """`qformer --help | true`: in a shell the reader is gone before anything is written. (rich ends with 1.)"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, '-m', 'qformer_jax', *words], cwd=small.ROOT, stdout=writing, stderr=-1)
    os.close(writing)
    assert done.returncode in (0, 1) and done.stderr == b''


def test_names_that_are_no_text_are_shown_with_escapes():
    code = "from qformer_jax.errors import command; command(lambda: print('caf\\udce9', '\\u00e9'))"
    strict = os.environ | {'PYTHONIOENCODING': 'utf-8:strict'}
    done = subprocess.run([sys.executable, '-c', code], cwd=small.ROOT, stdout=-1, env=strict, check=True)
    assert done.stdout == b'caf\\udce9 \xc3\xa9\n'


@pytest.mark.parametrize(
    'number, said', [(errno.EROFS, 'read-only file system: a/b'), (errno.EACCES, 'permission denied: a/b')]
)
def test_what_only_the_user_can_change_is_one_line(number, said, capsys):
    def fail():
        raise OSError(number, os.strerror(number), 'a/b')

    with pytest.raises(SystemExit) as stop:
        command(fail)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        command(lambda: Path('nowhere/at/all').read_text())
