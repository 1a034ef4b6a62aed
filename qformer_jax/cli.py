"""The command `qformer`: one thin function a command; options and help come from the dataclasses, through tyro.

Exit codes: 0 done (or stopped in good order by a signal), 1 a case of `verify` fails, 2 wrong input, with one line that
says what and how to go on.
"""

import contextlib
import errno
import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import config, recipes
from .commands.chat import Chat, chat
from .commands.encode import Encode, encode
from .commands.export import Export, export
from .commands.quantize import Quantize, quantize
from .commands.rank import Rank, rank
from .commands.search import Embed, Search, embed, search
from .commands.write import Ask, Caption, ask, caption
from .errors import Stopped, UserError, nearest

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
  qformer quantize RUN DEST --weights int8   a run in fewer bits, and what that costs
  qformer export RUN DEST           files that serve a run without this package
  qformer evaluate RUN --task TASK  vqa, caption or retrieval, on a split of the data set
  qformer verify CASE...            compare our numbers with recorded ones

Each has --help. The recipes: {recipes}
"""


@dataclass(frozen=True)
class Pack:
    """Turn a source into a data set that every stage reads, and train its two tokenizers on the train split."""

    source: tyro.conf.Positional[Literal['easy-vqa', 'folder', 'coco', 'features']]
    """`easy-vqa`: the PyPI package; `folder`: pictures with a captions.jsonl; `coco`: COCO / VQAv2 JSON files;
    `features`: .npy arrays [P, V] with a captions.jsonl."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    path: Path = Path('.')
    """Where the source lies (not for easy-vqa)."""
    text_tokenizer: Path | None = None
    """The Q-Former's vocabulary: BERT's vocab.txt, or a tokenizer.json; default: a WordPiece trained on the split."""
    lm_tokenizer: Path | None = None
    """The language model's: a tokenizer.json, or a folder with one or with OPT's vocab.json and merges.txt; default: a
    byte BPE trained on the split. A pretrained language model brings its own, from its run (`qformer convert`)."""


def pack(options: Pack) -> None:
    """Pack a data set."""
    from .data import pack as packing
    from .data import sources

    read = {
        'easy-vqa': sources.easy_vqa,
        'folder': lambda: sources.folder(options.path),
        'coco': lambda: sources.coco(options.path),
        'features': lambda: sources.features(options.path),
    }
    packing.pack(read[options.source](), options.out, options.text_tokenizer, options.lm_tokenizer)


@dataclass(frozen=True)
class Train:
    """Train one stage."""

    config: Annotated[config.Run, tyro.conf.arg(name='')]
    run: Path = tyro.MISSING
    """Folder of the run: checkpoints, log, curves; give the same one again to continue."""


def train(arguments: list[str]) -> None:
    """Train a recipe, its fields overridden by options."""
    if not arguments or arguments[0].startswith('-'):
        rows = [f'  {name:24} {recipes.load(name)[1].splitlines()[0]}' for name in recipes.names()]
        print('usage: qformer train RECIPE --run RUN [OPTIONS]   (qformer train RECIPE --help lists them)\n')
        print('\n'.join(rows))
        if not arguments:
            raise UserError('qformer train needs a recipe')
        return
    default, card = recipes.load(arguments[0])
    options = _parse(
        tyro.conf.AvoidSubcommands[Train],
        arguments[1:],
        prog=f'qformer train {arguments[0]}',
        description=card,
        default=Train(default),
    )
    from .training import loop

    done = loop.train(options.config, options.run)
    use = {'stage1': f'qformer evaluate {done.folder} --task retrieval'}
    use |= dict.fromkeys(('stage2', 'instruct'), f'qformer caption {done.folder} PICTURE')
    print(f'next: {use.get(done.run.stage, "train the next stage from it (qformer train)")}')


@dataclass(frozen=True)
class Evaluate:
    """Judge a finished run on a split of its data set; writes the numbers and every prediction beside the run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    task: Literal['vqa', 'caption', 'retrieval']
    """What is judged."""
    split: str = 'test'
    """Split, in tensorflow_datasets' notation."""
    data: Path | None = None
    """Data set; default: the one that the run was trained on (of several, the first)."""


def evaluate(options: Evaluate) -> None:
    """Print the table and say where the predictions are."""
    from .evaluation.task import evaluate as run_task

    run_task(options.run, options.task, options.split, options.data)


@dataclass(frozen=True)
class Verify:
    """Compare our numbers with those that Salesforce's PyTorch code (LAVIS) gave for the same weights and inputs.

    A case is a folder: meta.json (sizes, texts, what each array means), arrays.npz (inputs and results) and
    state_dict.safetensors (weights by LAVIS's names). The weights go through our conversion tables, the inputs through
    our networks, losses and decoding, and every recorded array gets a row: largest difference, the same relative to the
    array's largest entry, how much is allowed, pass or FAIL. Allowed is ten times what float32 itself does to the array
    (measured against float64), and never more than 1e-5 of its scale; gradients 1e-5 of the tensor's largest; ids must
    be equal. Exit code 1 if a row fails.

    With --against huggingface the folder is a model of Hugging Face instead (BLIP-2, its ITM model, InstructBLIP; OPT,
    Llama, T5, BERT or DINOv2 alone), and transformers computes the other side here and now: one row a layer, and the
    first layer that disagrees. Allowed is ten times what float32 does to that layer in our code. It needs PyTorch, and
    memory for the model in float32, one side after the other, and a few GB beside: 4 bytes a parameter, 16 GB for
    BLIP-2 with OPT-2.7B.
    """

    cases: tyro.conf.Positional[tuple[Path, ...]]
    """Folders, one a case; any sizes. With --against: one model's folder."""
    against: Literal['huggingface'] | None = None
    """Whose code computes the other side; default: it was recorded."""
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    """Compute dtype of our side; in bfloat16 the rows say what that costs, and the tolerance is as coarse."""


def verify(options: Verify) -> None:
    """Print a table a case."""
    if not options.cases:
        raise UserError('no case given: qformer verify CASE...')
    if options.against:
        from .verify import against

        if len(options.cases) > 1 or options.dtype != 'float32':
            raise UserError('--against huggingface takes one folder, and compares in float32')
        good = against.verify(options.cases[0])
    else:
        from .verify import kinds

        good = kinds.verify(options.cases, options.dtype)
    if not good:
        sys.exit(1)


@dataclass(frozen=True)
class Convert:
    """Bring published PyTorch checkpoints in, or take a run out, tensor for tensor.

    A published LAVIS file holds only what was trained (Q-Former, heads, projection), so name the vision tower's and the
    language model's checkpoints too:

      qformer convert blip2_pretrained.pth eva_vit_g.pth runs/blip2
      qformer convert blip2_pretrained_opt2.7b.pth eva_vit_g.pth opt-2.7b/ runs/blip2_opt
      qformer convert blip2-opt-2.7b/ runs/blip2_opt            (a Hugging Face folder has all parts)
      qformer convert SmolLM2-135M.gguf runs/smollm2          (with its tokenizer)
      qformer convert bert-base-uncased/ runs/bert --recipe blip2_vitg_stage1
      qformer convert runs/lora runs/merged                   (adds a LoRA to its language model)
      qformer convert runs/mine blip2.pth --to lavis
      qformer convert runs/mine blip2_huggingface --to huggingface

    Every tensor finds its place exactly once, or the command says which did not and writes nothing.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Sources (.pth, .safetensors, .onnx, .gguf, a Hugging Face folder, or a run), and last the destination."""
    to: Literal['ours', 'lavis', 'huggingface'] = 'ours'
    """What to write: a finished run of ours, LAVIS's file (.pth or .safetensors), or a Hugging Face folder."""
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
    """Type of the written weights; default: each as in its source, so that the way back gives equal bits."""
    recipe: str | None = None
    """A recipe (`qformer train` lists them) that states what files do not tell: attention heads of a size that was
    never published, the picture size to resize a position table to, the Q-Former that begins as a BERT."""
    text_tokenizer: Path | None = None
    """For `ours`: the Q-Former's vocabulary, BERT's vocab.txt or a tokenizer.json; the run needs it to read texts."""
    lm_tokenizer: Path | None = None
    """For `ours`: the language model's tokenizer: a tokenizer.json, a folder that holds one, or OPT's vocab.json and
    merges.txt, or a GGUF file; default: what lies in a source's folder or GGUF file, if the model has a
    language model."""


def convert(options: Convert) -> None:
    """Convert, and say what was found, left out, written, and what to do next."""
    from .training import exchange

    if len(options.paths) < 2:
        raise UserError('name at least one source and the destination: qformer convert SOURCE... DEST')
    *sources, dest = options.paths
    like = (recipes.load(options.recipe)[0].model,) if options.recipe else ()
    model = exchange.read(sources, *like)
    for note in model.notes:
        print(f'  {note}')
    if options.to == 'ours':
        written, left_out = (
            exchange.to_ours(model, dest, options.dtype, options.text_tokenizer, options.lm_tokenizer),
            [],
        )
    else:
        written, left_out = exchange.to_theirs(model, dest, options.to, options.dtype)
    if left_out:
        print(f'  left out, for want of a place there: {len(left_out)} tensors, {", ".join(left_out[:3])}, ...')
    print(f'wrote {", ".join(map(str, written))}')
    use = {'stage1': 'evaluate', 'vision': 'vit', 'language': 'lm'}.get(model.run.stage, 'caption')
    print(f'next: {_after_conversion(options.to, dest, use)}')


def _after_conversion(to: str, dest: Path, use: str) -> str:
    if to == 'lavis':
        return f"torch.load('{dest}')['model'] loads into LAVIS's class with strict=True"
    if to == 'huggingface':
        return f"transformers' class of its config.json: from_pretrained('{dest}')"
    uses = {
        'caption': f'qformer caption {dest} PICTURE',
        'evaluate': f'qformer evaluate {dest} --task retrieval --data DATA',
        'vit': f'train over it: qformer train RECIPE --start.vit {dest} --run RUN',
        'lm': f'train over it: qformer train RECIPE --start.lm {dest} --run RUN',
    }
    return uses[use]


COMMANDS: dict[str, tuple[type, Callable]] = {
    'data pack': (Pack, pack),
    'data encode': (Encode, encode),
    'caption': (Caption, caption),
    'ask': (Ask, ask),
    'rank': (Rank, rank),
    'chat': (Chat, chat),
    'search': (Search, search),
    'embed': (Embed, embed),
    'quantize': (Quantize, quantize),
    'export': (Export, export),
    'evaluate': (Evaluate, evaluate),
    'verify': (Verify, verify),
    'convert': (Convert, convert),
}


def _parse(kind: Any, arguments: list[str], **options: Any) -> Any:
    """Return tyro's result; its boxed error message becomes one line of a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """Return the text of tyro's error box; of the options that it suggests, the names only."""
    lines = [line.strip('│ ') for line in box.splitlines() if not line.startswith(('╭', '╰')) and '──' not in line]
    complaint, _, suggested = ' '.join(lines).partition(' Perhaps you meant: ')
    names = [name for name in re.findall(r'(?<!\S)--[\w.-]+', suggested) if name != '--help']
    return complaint + (f' (nearest: {", ".join(names)})' if names else '')


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
    function(_parse(kind, rest, prog=f'qformer {name}'))


def main() -> None:
    """Entry point of `qformer`."""
    try:
        run(sys.argv[1:])
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    except UserError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(_complain(f'disk full: could not write {error.filename or ""}'))


def _complain(message: str) -> int:
    print(f'error: {message}', file=sys.stderr)
    return 2
