"""`qformer export`: a run as files that need nothing of this package."""

from dataclasses import dataclass

from .options import ConnectorFile, NewFolder, RunFolder, Wait, class_of


@dataclass(frozen=True)
class Export:
    """Write a finished run as files that a server runs without this package: StableHLO for CPU, CUDA and TPU.

    The programs are encode, prefill and step (of a stage-1 run: image and text, which give ITC vectors), made with
    jax.export for any number of rows and texts of any length. They take and give arrays, which export.json names;
    the weights are an argument too, from one safetensors file. A page of code, run.py, shows how to call them: it
    describes a picture, answers a question, or says where a phrase is (if the run was trained with model.grounding),
    and needs jax, numpy, safetensors, tokenizers and Pillow. The weights of a run of `qformer quantize` stay small; for
    one or two rows the programs read them more slowly than this package does.
    """

    run: RunFolder
    """Folder of the run (`stage1` or later)."""
    dest: NewFolder
    """Folder to write."""
    connector: ConnectorFile = None
    wait: Wait = False


def export(options: Export) -> None:
    """Write the folder, and say what is in it."""
    from ..atomic import check_new
    from ..export.artifacts import write
    from ..inference.blip2 import Blip2
    from ..lock import one_writer
    from ..runs import run_dir

    own = class_of(options.connector)
    done = run_dir.finished(options.run, own)
    with one_writer(options.dest, options.wait):
        check_new(options.dest)
        written = write(Blip2.load(options.run, connector=own), options.dest, done.fingerprint)
    for name, size in written.items():
        print(f'  {name:24} {size:>14,} bytes')
    print(f'wrote {options.dest}')
    picture = 'PICTURE' if done.run.model.vit else 'FEATURES.npy'
    text = 'QUESTION' if done.run.model.lm else 'TEXT'
    print(f'next: python {options.dest / "run.py"} {picture} "{text}"')
    if done.run.model.grounding:
        print(f'or: python {options.dest / "run.py"} {picture} --where "PHRASE"')
