"""The command `qformer`: which words lead to which function; a file of `commands/` holds its options and help.

Exit codes: 0 done (or stopped in good order by a signal), 1 a case of `verify` fails, 2 wrong input, with one line that
says what and how to go on.
"""

import sys
from collections.abc import Callable

from . import recipes
from .commands.attention import Attention, attention
from .commands.chat import Chat, chat
from .commands.convert import Convert, convert
from .commands.encode import Encode, encode
from .commands.evaluate import Evaluate, evaluate
from .commands.export import Export, export
from .commands.ground import Ground, ground
from .commands.pack import Pack, pack
from .commands.parse import parse
from .commands.quantize import Quantize, quantize
from .commands.queries import Queries, queries
from .commands.rank import Rank, rank
from .commands.search import Embed, Search, embed, search
from .commands.train import train
from .commands.verify import Verify, verify
from .commands.write import Ask, Caption, ask, caption
from .errors import UserError, command, nearest

HELP = """\
qformer: train a Q-Former between a frozen vision tower and a frozen language model, and use it (BLIP-2).

  qformer data pack SOURCE OUT      turn pictures (or feature arrays) and texts into a data set
  qformer data encode DATA OUT --vit RUN  a data set of a frozen tower's features, to train from
  qformer train RECIPE --run RUN    train a stage; the same command continues a run that stopped
  qformer convert SOURCE... DEST    bring published checkpoints in, or take a run out
  qformer caption RUN PICTURE...    describe pictures
  qformer ask RUN PICTURE QUESTION  answer a question about a picture
  qformer chat RUN PICTURE          talk about pictures in the terminal
  qformer rank RUN PICTURE QUESTION ANSWER...  choose among given answers
  qformer search RUN FOLDER TEXT    find the pictures of a folder that fit a text
  qformer embed RUN PICTURE...      write ITC vectors of pictures and texts
  qformer attention RUN PICTURE     draw where the queries look, and what each does for a text
  qformer queries RUN               how much each query carries, over a data set
  qformer ground RUN PICTURE PHRASE...  say and draw where things are
  qformer quantize RUN DEST --weights int8   a run in fewer bits, and what that costs
  qformer export RUN DEST           files that serve a run without this package
  qformer evaluate RUN --task TASK  vqa, caption, retrieval or grounding, on a split of the data set
  qformer verify CASE...            compare our numbers with recorded ones

Each has --help. The recipes: {recipes}
"""


COMMANDS: dict[str, tuple[type, Callable]] = {
    'data pack': (Pack, pack),
    'data encode': (Encode, encode),
    'caption': (Caption, caption),
    'ask': (Ask, ask),
    'rank': (Rank, rank),
    'chat': (Chat, chat),
    'search': (Search, search),
    'embed': (Embed, embed),
    'attention': (Attention, attention),
    'queries': (Queries, queries),
    'ground': (Ground, ground),
    'quantize': (Quantize, quantize),
    'export': (Export, export),
    'evaluate': (Evaluate, evaluate),
    'verify': (Verify, verify),
    'convert': (Convert, convert),
}


def run(arguments: list[str]) -> None:
    """Run one command line; raises UserError for wrong input, Stopped after a signal, SystemExit after help."""
    if not arguments or arguments[0] in ('-h', '--help'):
        print(HELP.format(recipes=', '.join(recipes.names())))
        return
    name, rest = arguments[0], arguments[1:]
    if name == 'data' and rest:
        name, rest = f'data {rest[0]}', rest[1:]
    if name == 'train':
        return train(rest)
    if name not in COMMANDS:
        raise UserError(f"no command '{name}'{nearest(name, [*COMMANDS, 'train'])}; see qformer --help")
    kind, function = COMMANDS[name]
    function(parse(kind, rest, prog=f'qformer {name}'))


def main() -> None:
    """Entry point of `qformer`."""
    command(lambda: run(sys.argv[1:]))
