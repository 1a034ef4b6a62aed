"""The command `qformer`: which words lead to which function; a file of `commands/` holds its options and help.

Exit codes: 0 done (or stopped in good order by a signal), 1 a case of `verify` fails, 2 wrong input, with one line that
says what and how to go on. What needs no model (help, version, the list of recipes) imports none of JAX and tyro.
"""

import sys

from . import recipes
from .commands import COMMANDS, GROUPS, load
from .errors import UserError, command, nearest

HELP = """\
qformer: train a Q-Former between a frozen vision tower and a frozen language model, and use it (BLIP-2).

usage: qformer COMMAND ...
{groups}

`qformer COMMAND --help` says what a command does and lists its options, `qformer train` lists the recipes, and
`qformer --version` names the versions. RUN is the folder of a run, which `train` and `convert` write.
"""
DATA_HELP = """\
usage: qformer data COMMAND ...

{lines}

`qformer data COMMAND --help` lists the options of each.
"""
TRAIN_HELP = """\
usage: qformer train RECIPE --run RUN [OPTIONS]   (qformer train RECIPE --help lists them)

{recipes}

RECIPE is one of these names, or a .py file of your own.
"""
ASKED = ('-h', '--help')


def run(arguments: list[str]) -> None:
    """Run one command line; raises UserError for wrong input, Stopped after a signal, SystemExit after help."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ('--help', [])
    if name == 'data' and rest and rest[0] not in ASKED:
        name, rest = f'data {rest[0]}', rest[1:]
    if name in ASKED:
        print(HELP.format(groups=_groups()), end='')
    elif name == '--version':
        print(_versions())
    elif name == 'data':
        print(DATA_HELP.format(lines=_lines(GROUPS['Data'])), end='')
    elif name == 'train' and (not rest or rest[0].startswith('-')):
        _list_recipes(rest)
    elif name in COMMANDS:
        _run(name, rest)
    else:
        where = 'qformer data' if name.startswith('data ') else 'qformer'
        raise UserError(f"no command '{name}'{nearest(name, COMMANDS)}; see {where} --help")


def _run(name: str, words: list[str]) -> None:
    options, function = load(name)
    if options:
        from .commands.parse import parse

        words = parse(options, words, prog=f'qformer {name}')
    function(words)


def _groups() -> str:
    return ''.join(f'\n{title}\n{_lines(group)}\n' for title, group in GROUPS.items()).rstrip('\n')


def _lines(group: dict[str, tuple[str, str, str]]) -> str:
    """Return a line a command; what they do stands in one column over all groups."""
    width = max(len(f'{name} {words}') for name, (_, words, _) in COMMANDS.items())
    return '\n'.join(f'  {f"{name} {words}":{width}}  {does}' for name, (_, words, does) in group.items())


def _list_recipes(words: list[str]) -> None:
    firsts = {name: recipes.first_line(name) for name in recipes.names()}
    width = max(map(len, firsts))
    print(TRAIN_HELP.format(recipes='\n'.join(f'  {name:{width}}  {line}' for name, line in firsts.items())), end='')
    if not set(words) & set(ASKED):
        raise UserError(f'qformer train needs a recipe{f", before {words[0]}" if words else ""}')


def _versions() -> str:
    import platform
    from importlib import metadata

    def version(package: str) -> str:
        try:
            return f'{package} {metadata.version(package)}'
        except metadata.PackageNotFoundError:  # a checkout that pip does not know
            return f'{package} not installed'

    return ', '.join([*map(version, ('qformer_jax', 'jax', 'flax')), f'Python {platform.python_version()}'])


def main() -> None:
    """Entry point of `qformer`."""
    command(lambda: run(sys.argv[1:]))
