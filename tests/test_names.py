"""Names stay those of the field: words of our own that were replaced stay away; no two public classes share one."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from qformer_jax import config

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ('qformer_jax', 'experiments', 'tests') for path in (ROOT / room).rglob('*.py'))
REPLACED = re.compile(
    'seen|sees|exists|looked|look|ask_queries|name_words|in_time|in_front|after_prefix|touch_everything|applied|nudges|'
    'mixes|looks|bring_weights|left_behind|claim|theirs|ours|to_ours|to_theirs|judge_.*|Judged|UNBORN|OUTSIDE|KEEP|Fresh|'
    'apart|together|widen|Drawing|Writing|Keeping|Seen|Texts|Written|speaking|located|asked'
)
"""`kv`, `query_mask`, `encode_queries`, `to_jax`, `evaluate_vqa`, ... stand in their places."""
TABLES_OF_FAMILIES = 'config/canonical.py', 'models/families.py', 'convert/families.py'


def bound(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a file binds: functions, classes, arguments, variables, fields."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.arg():
                yield node.arg
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.keyword(arg=str()):
                yield node.arg
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr


def test_replaced_names_stay_away():
    """As names that our code binds, `Path.exists` being none; scripts that recorded goldens are kept as they ran."""
    files = [path for path in FILES if 'goldens' not in path.parts]
    found = {path: [name for name in bound(ast.parse(path.read_text())) if REPLACED.fullmatch(name)] for path in files}
    assert not {str(path.relative_to(ROOT)): names for path, names in found.items() if names}


def test_a_public_class_has_a_name_of_its_own():
    """But for `Connector`: the name by which a connector's file is found."""
    places = defaultdict(list)
    for path in FILES:
        if path.is_relative_to(ROOT / 'qformer_jax'):
            classes = (node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
            for name in classes:
                places[name].append(str(path.relative_to(ROOT)))
    shared = {name: files for name, files in places.items() if len(files) > 1 and not name.startswith('_')}
    assert shared.keys() == {'Connector'}


def test_configurations_keep_the_names_of_the_last_release():
    """Users' recipes import them."""
    for name in ('Blip2', 'Connector', 'Gates', 'Grounding', 'Llama', 'Lora', 'Opt', 'Qformer', 'T5', 'Time', 'Vit'):
        assert getattr(config, name) is getattr(config, f'{name}Config')


def test_a_language_models_family_is_asked_for_by_name_in_tables_alone():
    """Elsewhere the code asks for a property: `config.lm.encoder_decoder`, `family_of(config.lm).module`."""
    tables = {ROOT / 'qformer_jax' / name for name in TABLES_OF_FAMILIES}
    by_name = re.compile(r'family (==|!=)|\.family (not )?in |\[.*family\]')
    code = [path for path in FILES if path.is_relative_to(ROOT / 'qformer_jax') and path not in tables]
    assert not [str(path.relative_to(ROOT)) for path in code if by_name.search(path.read_text())]
