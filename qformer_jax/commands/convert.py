"""`qformer convert`: published checkpoints in, and runs out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import recipes
from ..config.ranges import FromZero
from ..errors import UserError
from .options import ConnectorFile, Wait, class_of


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
      qformer convert runs/mine runs/start16 --queries 16     (then train with --start.checkpoint runs/start16)
      qformer convert runs/mine blip2.pth --to lavis
      qformer convert runs/mine blip2_huggingface --to huggingface

    Every tensor finds its place exactly once, or the command says which did not and writes nothing.
    """

    paths: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar='SOURCE... DEST', help_behavior_hint='')
    ]
    """Sources (.pth, .safetensors, .onnx, .gguf, a Hugging Face folder, or a run), and last the destination."""
    to: Literal['ours', 'lavis', 'huggingface'] = 'ours'
    """What to write: a finished run of ours, LAVIS's file (.pth or .safetensors), or a Hugging Face folder."""
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None
    """Type of the written weights; default: each as in its source, so that the way back gives equal bits."""
    recipe: str | None = None
    """A recipe (`qformer train` lists them), for what files do not tell: how many attention heads a size has that
    was never published, the picture size to resize a position table to, how many blocks of a DINOv2 to keep, the
    first ones, or the Q-Former that begins as a BERT."""
    allow_nonfinite: bool = False
    """Write tensors that hold NaN or infinity too, and name them in provenance.json; default: nothing is written."""
    queries: FromZero = 0
    """How many queries the Q-Former gets; 0: as many as it has. Of fewer, the first ones are kept, for which a run
    with --objective.nested-queries is trained; more are copies with a little noise, to be trained."""
    order: Path | None = None
    """The queries.npz that `qformer queries` wrote of the source: the queries come in its order, best first."""
    text_tokenizer: Path | None = None
    """For `ours`: the Q-Former's vocabulary, BERT's vocab.txt or a tokenizer.json; the run needs it to read texts."""
    lm_tokenizer: Path | None = None
    """For `ours`: the language model's tokenizer: a tokenizer.json, a folder that holds one, or OPT's vocab.json and
    merges.txt, or a GGUF file; default: what lies in a source's folder or GGUF file, if the model has a
    language model."""
    connector: ConnectorFile = None
    wait: Wait = False


def convert(options: Convert) -> None:
    """Convert, and say what was found, left out, written, and what to do next."""
    from ..atomic import check_new
    from ..lock import one_writer

    if len(options.paths) < 2:
        raise UserError('name at least one source and the destination: qformer convert SOURCE... DEST')
    if options.order and not options.queries:
        raise UserError('--order says which queries come first: name how many to keep too, with --queries')
    with one_writer(options.paths[-1], options.wait):
        check_new(options.paths[-1])
        _convert(options)


def _convert(options: Convert) -> None:
    from ..runs import import_export
    from ..training.stages import STAGES

    *sources, dest = options.paths
    like = (recipes.load(options.recipe)[0].model,) if options.recipe else ()
    model = import_export.read(sources, *like, connector=class_of(options.connector))
    if options.queries:
        model = import_export.with_queries(model, options.queries, options.order)
    for note in model.notes:
        print(f'  {note}')
    if options.to == 'ours':
        tokenizers = options.text_tokenizer, options.lm_tokenizer
        written, left_out = (
            import_export.import_checkpoint(model, dest, options.dtype, *tokenizers, options.allow_nonfinite),
            [],
        )
    else:
        written, left_out = import_export.export_checkpoint(
            model, dest, options.to, options.dtype, options.allow_nonfinite
        )
    if left_out:
        print(f'  left out, for want of a place there: {len(left_out)} tensors, {", ".join(left_out[:3])}, ...')
    print(f'wrote {", ".join(map(str, written))}')
    print(f'next: {_after_conversion(options.to, dest, STAGES[model.run.stage].next_step_converted)}')


def _after_conversion(to: str, dest: Path, use: str) -> str:
    if to == 'lavis':
        return f"torch.load('{dest}')['model'] loads into LAVIS's class with strict=True"
    if to == 'huggingface':
        return f"transformers' class of its config.json: from_pretrained('{dest}')"
    return use.format(run=dest)
