"""What the documents say holds: paths exist, commands parse, links resolve, snippets run, no parameter is missing."""

import json
import re
import shlex
import types
from pathlib import Path

import pytest

from qformer_jax import cli, recipes
from qformer_jax.config import Run
from qformer_jax.errors import UserError
from qformer_jax.training import fit, loop

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / 'docs' / 'architecture.md'
DOCUMENTS = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
each_document = pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)

FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
CODE = re.compile(r'`([^`\n]+)`')
PATH = re.compile(r'(?<![\w./:-])[\w.-]+(?:/[\w.-]+)*/?')
LINK = re.compile(r'(?<!!)\[[^\]]+\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)')
FOLDERS = ('qformer_jax/', 'configs/', 'experiments/', 'tests/', 'docs/', 'notebooks/')
PLACEHOLDERS = {'RECIPE': 'easy_vqa_stage1', 'SOURCE': 'folder', 'TASK': 'vqa'}


def blocks(text: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text) if name == language]


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r'^#+ (.+)$', FENCE.sub('', text), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def named_paths(text: str) -> set[str]:
    """Return the paths in inline code that claim to be in the repository; `NAME` and the like are placeholders."""
    found = {match for code in CODE.findall(FENCE.sub('', text)) for match in PATH.findall(code)}
    claimed = {path for path in found if path.startswith(FOLDERS) or re.search(r'\w\.(py|md|ipynb|toml)$', path)}
    return {path for path in claimed if not re.search(r'(^|/)[A-Z]+(\.\w+)?(/|$)', path) or (ROOT / path).exists()}


def commands(text: str) -> list[str]:
    """Return the `qformer` command lines of a document: in blocks, in inline code, and indented ones."""
    joined = text.replace('\\\n', ' ')
    lines = [re.sub(r'^\s*(\$ )?', '', line) for line in joined.splitlines()]
    inline = CODE.findall(FENCE.sub('', joined))
    return [re.sub(r'\s+#.*| {2,}.*', '', line) for line in [*lines, *inline] if re.match(r'qformer [a-z]', line)]


def every_text() -> list[str]:
    """Return the documents, the recipes' cards and the notebook's texts."""
    book = json.loads((ROOT / 'notebooks' / 'quickstart.ipynb').read_text())
    texts = [path.read_text() for path in DOCUMENTS]
    texts += [recipes.load(name)[1] for name in recipes.names()]
    return [*texts, *(''.join(cell['source']) for cell in book['cells'] if cell['cell_type'] == 'markdown')]


def every_command() -> list[str]:
    return sorted({command for text in every_text() for command in commands(text)})


def checked(run: Run, folder: Path, wait: bool, restart: str) -> types.SimpleNamespace:
    """Do what `loop.train` does before it touches the disk."""
    loop.check(run)
    return types.SimpleNamespace(run=run, folder=folder)


@pytest.fixture
def parse(monkeypatch):
    """A function that takes a command line through the real parser, up to where the work would begin."""
    load = cli.load
    monkeypatch.setattr(cli, 'load', lambda name: (load(name)[0], lambda _: None) if name != 'train' else load(name))
    monkeypatch.setattr(loop, 'train', checked)
    monkeypatch.setattr(fit, 'split_option', lambda data, validation: '')

    def parse(line: str) -> None:
        words = [PLACEHOLDERS.get(word, word).removesuffix('...') for word in shlex.split(line)[1:]]
        words = [PLACEHOLDERS['RECIPE'] if word.endswith('.py') else word for word in words]
        if words[-1] != '--help' and words not in (['train'], *(name.split() for name in cli.COMMANDS)):
            cli.run(words)

    return parse


def test_commands_are_found_at_all():
    found = every_command()
    assert 'qformer train mine.py --run runs/mine' in found
    assert 'qformer train easy_vqa_vision --run runs/easy_vqa/vision' in found
    assert 'qformer data pack folder DATA --path PICTURES' in found


@pytest.mark.parametrize('line', every_command())
def test_every_command_parses(line, parse):
    parse(line)


@pytest.mark.parametrize(
    'line',
    [
        'qformer trian easy_vqa_stage1 --run x',
        'qformer train easy_vqa_stage9 --run x',
        'qformer train easy_vqa_stage1 --run x --training.step 3',
        'qformer train easy_vqa_stage1 --run x --training.steps 20',  # no longer than its warm-up
        'qformer evaluate RUN --task poetry',
    ],
)
def test_a_wrong_command_would_be_noticed(line, parse):
    with pytest.raises(UserError):
        parse(line)


def test_every_make_target_exists():
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    named = {name for text in every_text() for name in re.findall(r'(?:`|^\s*\$? ?)make (\w+)', text, re.MULTILINE)}
    assert 'demo' in named
    assert named <= targets


@each_document
def test_every_named_path_exists(document):
    places = (ROOT, ROOT / 'qformer_jax', document.parent)
    missing = [path for path in named_paths(document.read_text()) if not any((p / path).exists() for p in places)]
    assert not missing, f'{document.name} names what does not exist: {missing}'


@each_document
def test_every_internal_link_resolves(document):
    for target in filter(None, (a or b for a, b in LINK.findall(document.read_text()))):
        if re.match(r'https?:|mailto:', target):
            continue
        file, _, anchor = target.partition('#')
        path = (document.parent / file) if file else document
        assert path.exists(), f'{document.name} links to {target}'
        assert not anchor or anchor in anchors(path.read_text()), f'{document.name} links to {target}'


@each_document
def test_python_snippets_compile(document):
    for code in blocks(document.read_text(), 'python'):
        compile(code, document.name, 'exec')


def test_snippets_of_the_architecture_run(tmp_path):
    rules, _, recipe = blocks(ARCHITECTURE.read_text(), 'python')  # the second: tests/test_feature_cache.py
    exec(rules, {})
    (tmp_path / 'sounds.py').write_text(recipe)
    run, card = recipes.load(str(tmp_path / 'sounds.py'))
    loop.check(run)
    assert run.model.vit is None
    assert card.startswith('Stage 1')


def test_the_nnx_snippet_runs():
    (snippet,) = blocks((ROOT / 'docs' / 'why_linen.md').read_text(), 'python')
    names = {}
    exec(snippet, names)
    assert abs(names['features'] - names['same']).max() < 1e-5


def test_the_legend_has_every_parameter_path():
    text = ''.join(blocks(ARCHITECTURE.read_text(), 'text'))
    legend = {path for line in text.splitlines() for path in expand(line.split()[0])}
    lines = (ROOT / 'tests' / 'goldens' / 'parameter_paths.txt').read_text().splitlines()
    paths = {re.sub(r'layer_\d+', 'layer_I', line.split()[0]) for line in lines}
    owners = {path: {path, path.rpartition('/')[0]} & legend for path in paths}
    assert not [path for path, owner in owners.items() if not owner]
    assert legend == set().union(*owners.values())


def expand(pattern: str) -> list[str]:
    """Return `a/b, a/c` for `a/{b,c}`, for every pair of braces."""
    match = re.search(r'\{(.*?)\}', pattern)
    words = match[1].split(',') if match else []
    return [path for word in words for path in expand(pattern.replace(match[0], word, 1))] or [pattern]


def product_files() -> list[Path]:
    folders = [path for name in FOLDERS if name != 'tests/' for path in (ROOT / name).rglob('*')]
    kinds = ('.py', '.md', '.ipynb', '.toml', '.json', '.jsonl', '.txt')
    return [p for p in [*folders, *ROOT.glob('*')] if p.is_file() and (p.suffix in kinds or p.name == 'Makefile')]


def test_no_file_tells_how_it_was_made():
    files = product_files()
    assert ROOT / 'qformer_jax' / 'cli.py' in files
    words = re.compile(r'\bticket|this session|/work/|/tmp/|/root/|^[<>]{7} ', re.IGNORECASE | re.MULTILINE)
    found = {str(path.relative_to(ROOT)): words.findall(path.read_text()) for path in files}
    assert not {path: hits for path, hits in found.items() if hits}
