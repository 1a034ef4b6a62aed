"""Network sizes by name: the published ones, and tiny ones that train on two cores in minutes."""

from dataclasses import replace

from .config import LlamaConfig, OptConfig, QformerConfig, T5Config, VitConfig

VIT_G = VitConfig()
"""EVA ViT-g/14, 224 px, as BLIP-2 uses it: 985,894,528 parameters."""

VIT_G_364 = VitConfig(image_size=364)
"""ViT-g as fine-tuned on COCO: 677 positions."""

VIT_G_490 = VitConfig(image_size=490)
"""ViT-g as fine-tuned on VQAv2: 1,226 positions."""

VIT_L = VitConfig(
    width=1024,
    depth=22,  # LAVIS builds 23 layers and drops the last
    mlp_width=4096,
    norm_eps=1e-5,
    activation='quick_gelu',
    attention_bias='all',
    patch_bias=False,
    pre_norm=True,
    position_resize='align_corners',
)
"""CLIP ViT-L/14, 224 px, without its last block: 277,985,280 parameters."""

DINOV2_S = VitConfig(
    image_size=518,
    width=384,
    depth=12,
    heads=6,
    mlp_width=1536,
    attention_bias='all',
    layer_scale=True,
    final_norm=True,
)
"""DINOv2 ViT-S/14 (position table of 518 px)."""

DINOV2_S_224 = replace(DINOV2_S, image_size=224, depth=9, final_norm=False)
"""The first 9 blocks of it at 224 px, 256 patches and a class token: as `qformer parts dinov2-s` brings it in."""

QFORMER_G = QformerConfig()
"""BERT-base Q-Former over ViT-g: 186,705,470 parameters, all trained in stage 1."""

QFORMER_L = QformerConfig(feature_width=1024)
"""BERT-base Q-Former over ViT-L: 183,165,758 parameters."""

MINILM_QFORMER = QformerConfig(
    feature_width=384,
    num_queries=8,
    width=384,
    depth=6,
    heads=12,
    mlp_width=1536,
    dropout=0.0,
)
"""Over DINOv2 ViT-S, begins as all-MiniLM-L6-v2 (`qformer parts minilm`)."""

OPT_125M = OptConfig(width=768, depth=12, heads=12, mlp_width=3072)

OPT_350M = OptConfig(width=1024, depth=24, heads=16, mlp_width=4096, embed_width=512, norm_first=False)
"""The odd one: narrow token vectors, and each norm behind its branch."""

OPT_1_3B = OptConfig(width=2048, depth=24, heads=32, mlp_width=8192)

OPT_2_7B = OptConfig()

OPT_6_7B = OptConfig(width=4096, depth=32, heads=32, mlp_width=16384)

OPT_13B = OptConfig(width=5120, depth=40, heads=40, mlp_width=20480)

OPT_30B = OptConfig(width=7168, depth=48, heads=56, mlp_width=28672)

OPT_66B = OptConfig(width=9216, depth=64, heads=72, mlp_width=36864)

VICUNA_7B = LlamaConfig()
"""Vicuna-7B v1.1 with a row for padding, as in InstructBLIP: 6,738,423,808 parameters."""

VICUNA_13B = LlamaConfig(width=5120, depth=40, heads=40, kv_heads=40, mlp_width=13824)
"""13,015,874,560 parameters."""

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    width=576,
    depth=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    mlp_width=1536,
    max_positions=8192,
    rope_base=100_000.0,
    norm_eps=1e-5,
    tied=True,
)
"""134,515,008 parameters."""

FLAN_T5_XL = T5Config()
"""2,849,757,184 parameters."""

FLAN_T5_XXL = T5Config(width=4096, heads=64, mlp_width=10240)
"""11,135,332,352 parameters."""

TINY_VIT = VitConfig(image_size=64, patch_size=8, width=64, depth=4, heads=2, mlp_width=128, attention_bias='all')
"""For 64 px pictures of simple shapes; with patches of 16 px it cannot tell them apart."""

TINY_QFORMER = QformerConfig(
    feature_width=0,
    num_queries=3,  # as many as a caption has tokens: the frozen language model then meets the positions it was taught
    width=64,
    depth=4,
    heads=4,
    mlp_width=256,
    vocab_size=0,
    max_positions=64,
    embed_width=64,
    dropout=0.0,  # random bits cost a fifth of a step on a CPU; validation is no worse without it
)

TINY_OPT = OptConfig(vocab_size=0, width=64, depth=3, heads=4, mlp_width=256, max_positions=96)
