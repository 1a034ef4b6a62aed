#!/usr/bin/env python3
"""Reference ("golden") data for BLIP-2 made by running Salesforce's own PyTorch code
(PyPI package salesforce-lavis 1.0.2, files unmodified) at tiny sizes with random weights.

    python make_lavis_goldens.py [--out DIR] [--sizes tiny|odd|deep|wide|low_variance|small] [--case NAME ...] [--float64]

What is patched at run time, and why, is listed in PATCHES below and in README.md.
No LAVIS code is copied into this file.
"""
import argparse
import importlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings

warnings.simplefilter("ignore")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

HERE = os.path.dirname(os.path.abspath(__file__))
if os.environ.get("GOLDENS_TF426"):  # cross-check only: transformers 4.26.1 installed with --target
    sys.path.insert(0, os.environ["GOLDENS_TF426"])

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

torch.set_num_threads(1)

# --------------------------------------------------------------------------------------
# 1. Import LAVIS without its heavy package __init__ files
# --------------------------------------------------------------------------------------
LAVIS_ROOT = importlib.util.find_spec("lavis").submodule_search_locations[0]
BARE_PACKAGES = ["lavis", "lavis.models", "lavis.models.blip_models", "lavis.processors",
                 "lavis.datasets", "lavis.datasets.datasets", "lavis.tasks", "lavis.runners"]
ABSENT_MODULES = ["pandas", "cv2", "webdataset", "decord"]


STAND_INS = []


def _prepare_imports():
    for name in BARE_PACKAGES:
        m = types.ModuleType(name)
        m.__path__ = [os.path.join(LAVIS_ROOT, *name.split(".")[1:])]
        sys.modules[name] = m
    for name in ABSENT_MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            m = types.ModuleType(name)
            m.__getattr__ = lambda attr, _n=name: _absent(_n, attr)
            if name == "decord":
                m.bridge = types.SimpleNamespace(set_bridge=lambda *a: None)
            sys.modules[name] = m
            STAND_INS.append(name)


def _absent(module, attr):
    if attr.startswith("__"):
        raise AttributeError(attr)
    return type(attr, (), {})


import transformers                                                            # noqa: E402  (before the stand-ins: it looks for decord)
_prepare_imports()
# lavis.common.registry looks these two up on the (bare) packages
sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel
sys.modules["lavis.processors"].BaseProcessor = importlib.import_module("lavis.processors.base_processor").BaseProcessor
from lavis.models import eva_vit as EVA                                        # noqa: E402
from lavis.models import clip_vit as CLIPVIT                                   # noqa: E402
from lavis.models.blip2_models import blip2 as B2                              # noqa: E402
from lavis.models.blip2_models import Qformer as QF                            # noqa: E402
from lavis.models.blip2_models import blip2_qformer as B2Q                     # noqa: E402
from lavis.models.blip2_models import blip2_image_text_matching as B2ITM       # noqa: E402
from lavis.models.blip2_models import blip2_opt as B2O                         # noqa: E402
from lavis.models.blip2_models import blip2_t5 as B2T                          # noqa: E402
from lavis.common import optims as OPTIMS                                      # noqa: E402
from lavis.runners import runner_base as RB                                    # noqa: E402
from lavis.processors import blip_processors as BP                             # noqa: E402
for _name in STAND_INS:         # LAVIS modules keep their references; nothing else should see the stand-ins
    del sys.modules[_name]
from functools import partial                                                  # noqa: E402
from safetensors.torch import save_file                                        # noqa: E402

transformers.logging.set_verbosity_error()

PATCHES = {
    "package_inits": "Bare stand-ins (only __path__) for the packages %s, so that their __init__ files, which import "
                     "every LAVIS model and data set, do not run." % ", ".join(BARE_PACKAGES),
    "absent_modules": "Empty stand-ins for %s when absent (only used by code that is not run here)." % ", ".join(ABSENT_MODULES),
    "BertTokenizer.from_pretrained": "returns BertTokenizer(tokenizers/bert_vocab.txt); LAVIS then adds [DEC] itself.",
    "BertConfig.from_pretrained": "returns the tiny BertConfig of the meta file.",
    "BertLMHeadModel.from_pretrained": "returns BertLMHeadModel(config), random; no bert-base-uncased weights.",
    "create_eva_vit_g": "in blip2.py's name space: lavis.models.eva_vit.VisionTransformer with create_eva_vit_g's own "
                        "arguments except size/depth/width/heads; no download.",
    "create_clip_vit_L": "same, lavis.models.clip_vit.VisionTransformer.",
    "AutoTokenizer.from_pretrained (blip2_opt)": "returns the slow GPT2Tokenizer of tokenizers/opt_{vocab.json,merges.txt} with "
                                     "add_bos_token=True, bos=eos=unk='</s>', pad='<pad>' as facebook/opt-* has it.",
    "OPTForCausalLM.from_pretrained": "returns a tiny random float32 OPTForCausalLM (LAVIS asks for float16).",
    "T5TokenizerFast.from_pretrained": "returns T5TokenizerFast(tokenizers/t5_spiece.model, extra_ids=4).",
    "T5Config.from_pretrained / T5ForConditionalGeneration.from_pretrained": "tiny random T5; LAVIS casts it to bfloat16, then "
                                     "model.float() (as LAVIS load_model(device='cpu') does) and every parameter is re-randomised.",
    "recorders": "torch.multinomial, F.cross_entropy and the language models' forward/generate are wrapped to record what goes "
                 "through them; values are not changed. The generate wrappers add output_scores=True, return_dict_in_generate=True.",
}

# --------------------------------------------------------------------------------------
# 2. Tiny tokenizers
# --------------------------------------------------------------------------------------
WORDS = """a an the and or of on in at with by to from near under over is are was has it this that what which who how
many where color cat cats dog dogs man woman boy girl people child horse bird boat car bus train bike ball park lake
city street night day today sky sea sun tree trees mountain mountains house room table chair sofa bed food pizza cake
red blue green white black small big old young two three sitting standing playing riding eating holding running
walking photo picture image question answer short no yes one blue men her his""".split()
SUFFIXES = ["##ing", "##ed", "##er", "##ly", "##es"]
PUNCT = list(".,!?'-:;()\"/&")

CAPTIONS = [
    "a cat sitting on a red sofa",
    "two dogs playing with a ball in the park",
    "A man riding a horse.",
    "the city at night",
    "a small boat on the blue lake near green mountains under the white sky today",
    "zebra",
]
CORPUS = CAPTIONS + [
    "a photo of a cat", "a photo of two dogs", "question: what color is the sofa? answer: red",
    "question: how many dogs are in the park? short answer: two", "a woman eating pizza at the table",
    "a young boy holding a white ball", "the old house near the lake", "people walking on the street at night",
    "a picture of a bus and a train", "what is the man riding?", "where is the cat?", "three birds over the sea",
    "a child standing by the tree", "the sun is over the mountains", "blue", "red", "two", "a horse", "yes", "no",
]


def make_bert_vocab(path):
    v = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + PUNCT + list("0123456789")
    letters = [chr(c) for c in range(97, 123)]
    v += letters + ["##" + c for c in letters] + SUFFIXES
    for w in [*WORDS, *EXTRA_WORDS]:
        if w not in v and w not in ABSENT_WORDS:
            v.append(w)
    assert len(v) == len(set(v))
    with open(path, "w") as f:
        f.write("\n".join(v) + "\n")
    return len(v)


def make_opt_bpe(vocab_path, merges_path):
    """Plain byte-level BPE, GPT-2 style; ids 0..3 as in OPT: <s> <pad> </s> <unk>."""
    import regex
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode
    b2u = bytes_to_unicode()
    pat = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
    words = {}
    for line in CORPUS:
        for tok in pat.findall(line + "\n"):
            w = tuple(b2u[b] for b in tok.encode("utf-8"))
            words[w] = words.get(w, 0) + 1
    merges = []
    for _ in range(OPT_MERGES):
        pairs = {}
        for w, c in words.items():
            for p in zip(w, w[1:]):
                pairs[p] = pairs.get(p, 0) + c
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))
        if pairs[best] < 2:
            break
        merges.append(best)
        new = {}
        for w, c in words.items():
            out, i = [], 0
            while i < len(w):
                if i + 1 < len(w) and (w[i], w[i + 1]) == best:
                    out.append(w[i] + w[i + 1]); i += 2
                else:
                    out.append(w[i]); i += 1
            new[tuple(out)] = new.get(tuple(out), 0) + c
        words = new
    tokens = ["<s>", "<pad>", "</s>", "<unk>"] + list(b2u.values()) + ["".join(m) for m in merges]
    with open(vocab_path, "w") as f:
        json.dump({t: i for i, t in enumerate(tokens)}, f, ensure_ascii=True, indent=0)
        f.write("\n")
    with open(merges_path, "w") as f:
        f.write("#version: 0.2\n" + "".join("%s %s\n" % m for m in merges))
    return len(tokens)


def make_t5_spm(path):
    import sentencepiece as spm
    buf = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buf, vocab_size=T5_PIECES, model_type="unigram",
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        num_threads=1, minloglevel=2)
    with open(path, "wb") as f:
        f.write(buf.getvalue())


TOK = None          # directory with tokenizer files


def bert_tokenizer():
    return transformers.BertTokenizer(os.path.join(TOK, "bert_vocab.txt"))


def opt_tokenizer():
    return transformers.GPT2Tokenizer(
        os.path.join(TOK, "opt_vocab.json"), os.path.join(TOK, "opt_merges.txt"),
        unk_token="</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True)


def t5_tokenizer():
    t = transformers.T5TokenizerFast(os.path.join(TOK, "t5_spiece.model"), extra_ids=T5_EXTRA)
    t.sanitize_special_tokens()       # from_pretrained would do this: makes <pad> </s> <unk> special for decoding
    return t


# --------------------------------------------------------------------------------------
# 3. Tiny configurations, patches, random weights
# --------------------------------------------------------------------------------------
# One table of sizes: `tiny` is complete, the others say what differs; use_sizes() makes them the globals below.
# Seeds were searched so that greedy/beam ids do not hang on near ties (assert_robust) and some rows end before the others.
SIZES = {
    "tiny": dict(
        IMG=56,
        EVA_CFG=dict(img_size=56, patch_size=14, use_mean_pooling=False, embed_dim=48, depth=2, num_heads=4,
                     mlp_ratio=4.3637, qkv_bias=True, drop_path_rate=0.0),     # + norm_layer LayerNorm eps 1e-6
        CLIP_CFG=dict(input_resolution=56, patch_size=14, width=48, layers=3, heads=4, use_grad_checkpointing=False),
        BERT_CFG=dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=72,
                      max_position_embeddings=40),                              # rest: BertConfig defaults
        CROSS_FREQ=2,
        NUM_QUERY=8,
        EMBED_DIM=16,
        MAX_TXT=12,
        TEMP=343 / 4096.0,                                                      # 0.0837...
        OPT_CFG=dict(hidden_size=40, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=40,
                     max_position_embeddings=96, do_layer_norm_before=True, activation_function="relu",
                     pad_token_id=1, bos_token_id=2, eos_token_id=2, dropout=0.1),
        T5_CFG=dict(d_model=40, d_kv=12, d_ff=96, num_layers=2, num_decoder_layers=2, num_heads=4,
                    relative_attention_num_buckets=8, relative_attention_max_distance=20,
                    feed_forward_proj="gated-gelu", tie_word_embeddings=False, layer_norm_epsilon=1e-6,
                    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.1),
        ABSENT_WORDS=(), EXTRA_WORDS=(), OPT_MERGES=96, T5_PIECES=140, T5_EXTRA=4,      # vocabularies
        PAIRS=6, CLIP_PAIRS=3, WORLD=2, ITM_IMAGES=5, K_TEST=4, GEN_IMAGES=4, OPT_IMAGES=4, T5_IMAGES=3,
        SEED=dict(eva=101, clip=102, stage1=212, opt=320, t5=414, stage1_clip=202, pix=11, draw=0),
        GEN_SEP_BIAS=5.0,
        OPT_NEWLINE_BOOST=2.5,
        QFORMER_GENERATE=[("greedy", dict(num_beams=1)), ("beam3", dict(num_beams=3)),
                          ("beam3_short", dict(num_beams=3, max_length=12, min_length=3)),
                          ("greedy_short", dict(num_beams=1, max_length=12, min_length=3))],
        OPT_PROMPTS=[("p0", ""), ("p1", "a photo of"), ("p2", "question: what color is the sofa? answer:")],
        OPT_GENERATE=[("greedy", dict(num_beams=1, max_length=12)), ("beam5", dict(num_beams=5, max_length=12)),
                      ("beam5_min8_lp", dict(num_beams=5, max_length=10, min_length=8, length_penalty=-1.0)),
                      ("greedy_rep", dict(num_beams=1, max_length=12, repetition_penalty=1.5))],
        OPT_CAPTIONS=("p1", dict(num_beams=4, num_captions=3, max_length=8)),
        T5_GENERATE=[("greedy", dict(num_beams=1, max_length=12)), ("beam5", dict(num_beams=5, max_length=12)),
                     ("beam3_lp_neg", dict(num_beams=3, max_length=12, length_penalty=-1.0)),
                     ("beam3_rep", dict(num_beams=3, max_length=10, repetition_penalty=1.5, min_length=6))],
        T5_ANSWER=dict(),
        CASE_NAME="%s", ONLY=None, GENERATE=True, GRADIENTS=True, SCALES=()),
    # odd widths, 3 and 5 heads, 6 Q-Former layers with cross-attention in two of them, 5 queries, a 3x3 grid
    "odd": dict(
        IMG=42,
        EVA_CFG=dict(img_size=42, embed_dim=45, depth=3, num_heads=3, mlp_ratio=2.7),
        CLIP_CFG=dict(input_resolution=42, width=35, layers=4, heads=5),
        BERT_CFG=dict(hidden_size=33, num_hidden_layers=6, num_attention_heads=3, intermediate_size=71,
                      max_position_embeddings=37),
        CROSS_FREQ=3, NUM_QUERY=5, EMBED_DIM=11, MAX_TXT=9, TEMP=205 / 4096.0,
        OPT_CFG=dict(hidden_size=50, num_hidden_layers=3, num_attention_heads=5, ffn_dim=77, word_embed_proj_dim=50,
                     max_position_embeddings=61),
        T5_CFG=dict(d_model=27, d_kv=7, d_ff=53, num_layers=3, num_decoder_layers=2, num_heads=5,
                    relative_attention_num_buckets=6, relative_attention_max_distance=11),
        ABSENT_WORDS=("boat", "lake", "mountains", "night", "zebra", "bus", "train", "bike"), OPT_MERGES=61, T5_PIECES=101, T5_EXTRA=3,
        PAIRS=4, CLIP_PAIRS=2, ITM_IMAGES=4, K_TEST=3, GEN_IMAGES=3, OPT_IMAGES=3, T5_IMAGES=2,
        SEED=dict(eva=1101, clip=1102, stage1=1212, opt=1325, t5=1415, stage1_clip=1202, pix=31, draw=1000),
        QFORMER_GENERATE=[("greedy", dict(num_beams=1)), ("beam5", dict(num_beams=5)),
                          ("beam2_short", dict(num_beams=2, max_length=9, min_length=2)),
                          ("greedy_short", dict(num_beams=1, max_length=14, min_length=1))],
        OPT_PROMPTS=[("p0", ""), ("p1", "a picture of a"), ("p2", "what is the man riding?")],
        OPT_GENERATE=[("greedy", dict(num_beams=1, max_length=15)), ("beam3", dict(num_beams=3, max_length=9)),
                      ("beam4_min6_lp", dict(num_beams=4, max_length=8, min_length=6, length_penalty=-0.5)),
                      ("greedy_rep", dict(num_beams=1, max_length=10, repetition_penalty=2.5))],
        OPT_CAPTIONS=("p0", dict(num_beams=5, num_captions=5, max_length=6)),
        T5_GENERATE=[("greedy", dict(num_beams=1, max_length=15)), ("beam2", dict(num_beams=2, max_length=9)),
                     ("beam4_lp2", dict(num_beams=4, max_length=12, length_penalty=2.0)),
                     ("beam3_rep", dict(num_beams=3, max_length=7, repetition_penalty=1.2, min_length=4))],
        T5_ANSWER=dict(num_beams=3, max_len=7, min_len=2, length_penalty=0.5)),
    # more layers, 6 heads of 6 and 5, a 5x5 grid, four processes
    "deep": dict(
        IMG=70,
        EVA_CFG=dict(img_size=70, embed_dim=36, depth=5, num_heads=6, mlp_ratio=3.1),
        CLIP_CFG=dict(input_resolution=70, width=30, layers=6, heads=3),
        BERT_CFG=dict(hidden_size=30, num_hidden_layers=6, num_attention_heads=6, intermediate_size=61,
                      max_position_embeddings=50),
        NUM_QUERY=7, EMBED_DIM=9, MAX_TXT=16, TEMP=1024 / 4096.0,
        OPT_CFG=dict(hidden_size=36, num_hidden_layers=4, num_attention_heads=6, ffn_dim=91, word_embed_proj_dim=36,
                     max_position_embeddings=80),
        T5_CFG=dict(d_model=30, d_kv=5, d_ff=70, num_layers=2, num_decoder_layers=4, num_heads=6,
                    relative_attention_num_buckets=12, relative_attention_max_distance=16),
        EXTRA_WORDS=("cup", "plate", "window"), OPT_MERGES=80, T5_PIECES=120, T5_EXTRA=7,
        PAIRS=8, CLIP_PAIRS=4, WORLD=4, ITM_IMAGES=6, K_TEST=2, GEN_IMAGES=2, OPT_IMAGES=2, T5_IMAGES=4,
        SEED=dict(eva=2101, clip=2102, stage1=2214, opt=2324, t5=2416, stage1_clip=2202, pix=41, draw=2000),
        QFORMER_GENERATE=[("greedy", dict(num_beams=1)), ("beam4", dict(num_beams=4)),
                          ("beam6_short", dict(num_beams=6, max_length=8, min_length=4)),
                          ("greedy_short", dict(num_beams=1, max_length=10, min_length=5))],
        OPT_PROMPTS=[("p0", ""), ("p1", "a photo of two"), ("p2", "question: where is the cat? answer:")],
        OPT_GENERATE=[("greedy", dict(num_beams=1, max_length=10)), ("beam6", dict(num_beams=6, max_length=10)),
                      ("beam2_min9_lp", dict(num_beams=2, max_length=12, min_length=9, length_penalty=2.0)),
                      ("greedy_rep", dict(num_beams=1, max_length=9, repetition_penalty=1.2))],
        OPT_CAPTIONS=("p1", dict(num_beams=3, num_captions=2, max_length=9)),
        T5_GENERATE=[("greedy", dict(num_beams=1, max_length=9)), ("beam6", dict(num_beams=6, max_length=10)),
                     ("beam3_lp_zero", dict(num_beams=3, max_length=10, length_penalty=0.0)),
                     ("beam4_rep", dict(num_beams=4, max_length=9, repetition_penalty=1.5, min_length=3))],
        T5_ANSWER=dict(num_beams=4, max_len=8)),
    # wide and shallow, patches of 10 and 12 px, cross-attention in every layer, T5's published buckets, three processes
    "wide": dict(
        IMG=60,
        EVA_CFG=dict(img_size=60, patch_size=10, embed_dim=80, depth=1, num_heads=5, mlp_ratio=4.0),
        CLIP_CFG=dict(input_resolution=60, patch_size=12, width=66, layers=2, heads=6),
        BERT_CFG=dict(hidden_size=60, num_hidden_layers=3, num_attention_heads=5, intermediate_size=131,
                      max_position_embeddings=64),
        CROSS_FREQ=1, NUM_QUERY=12, EMBED_DIM=29, MAX_TXT=24, TEMP=100 / 4096.0,
        OPT_CFG=dict(hidden_size=72, num_hidden_layers=1, num_attention_heads=3, ffn_dim=201, word_embed_proj_dim=72,
                     max_position_embeddings=128),
        T5_CFG=dict(d_model=48, d_kv=17, d_ff=111, num_layers=1, num_decoder_layers=1, num_heads=3,
                    relative_attention_num_buckets=32, relative_attention_max_distance=128),
        EXTRA_WORDS=("cup", "plate", "window", "door", "garden"), OPT_MERGES=120, T5_PIECES=150, T5_EXTRA=10,
        PAIRS=9, CLIP_PAIRS=5, WORLD=3, ITM_IMAGES=7, K_TEST=5, GEN_IMAGES=5, OPT_IMAGES=5, T5_IMAGES=3,
        SEED=dict(eva=3101, clip=3102, stage1=3216, opt=3323, t5=3418, stage1_clip=3202, pix=51, draw=3000),
        QFORMER_GENERATE=[("greedy", dict(num_beams=1)), ("beam2", dict(num_beams=2)),
                          ("beam4_short", dict(num_beams=4, max_length=16, min_length=6)),
                          ("greedy_short", dict(num_beams=1, max_length=7, min_length=2))],
        OPT_PROMPTS=[("p0", ""), ("p1", "the city"), ("p2", "question: how many dogs are in the park? short answer:")],
        OPT_GENERATE=[("greedy", dict(num_beams=1, max_length=9)), ("beam2", dict(num_beams=2, max_length=14)),
                      ("beam3_min7_lp", dict(num_beams=3, max_length=9, min_length=7, length_penalty=0.3)),
                      ("greedy_rep", dict(num_beams=1, max_length=14, repetition_penalty=1.8))],
        OPT_CAPTIONS=("p2", dict(num_beams=2, num_captions=2, max_length=10)),
        T5_GENERATE=[("greedy", dict(num_beams=1, max_length=18)), ("beam3", dict(num_beams=3, max_length=14)),
                     ("beam5_lp", dict(num_beams=5, max_length=9, length_penalty=-2.0)),
                     ("beam2_rep", dict(num_beams=2, max_length=12, repetition_penalty=2.0, min_length=8))],
        T5_ANSWER=dict(num_beams=2, max_len=12, min_len=3, length_penalty=1.0)),
    # smaller than tiny, its tokenizers; weights scaled so that what enters every norm has a variance of a few of its epsilons
    "low_variance": dict(
        IMG=28,
        EVA_CFG=dict(img_size=28, embed_dim=24, num_heads=2, mlp_ratio=2.0),
        CLIP_CFG=dict(input_resolution=28, width=24, heads=2),
        BERT_CFG=dict(hidden_size=20, num_hidden_layers=3, num_attention_heads=2, intermediate_size=28),
        NUM_QUERY=4, EMBED_DIM=8,
        OPT_CFG=dict(hidden_size=20, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=20),
        T5_CFG=dict(d_model=20, d_kv=6, d_ff=28, num_heads=2),
        OPT_IMAGES=3, T5_IMAGES=2, OPT_NEWLINE_BOOST=0.0,
        SEED=dict(eva=4101, clip=4102, stage1=4212, opt=4320, t5=4414, pix=61),
        CASE_NAME="low_variance_%s", ONLY=("eva_vit", "clip_vit", "qformer_modes", "opt_stage2", "t5_stage2"),
        GENERATE=False, GRADIENTS=False,
        SCALES=(            # first match; powers of two keep the values exact. LayerNorm and T5's norm: eps 1e-6 and 1e-5; BERT: 1e-12
            (r"(visual_encoder\.)?(patch_embed\..*|cls_token|pos_embed|blocks\.\d+\.(attn\.proj|mlp\.fc2)\..*)", 2.0 ** -8),
            (r"(visual_encoder\.)?(conv1\.weight|class_embedding|positional_embedding|ln_pre\..*)", 2.0 ** -8),
            (r"(visual_encoder\.)?transformer\.resblocks\.\d+\.(attn\.out_proj|mlp\.c_proj)\..*", 2.0 ** -8),
            (r"query_tokens|Qformer\.bert\..*(embeddings|LayerNorm)\..*", 2.0 ** -18),
            (r"Qformer\.bert\..*(attention\.output\.dense|attention\.self\.value)\.bias", 2.0 ** -18),
            (r"Qformer\.bert\..*(crossattention\.output|\d\.output(_query)?)\.dense\..*", 2.0 ** -18),
            (r"Qformer\.cls\.predictions\.transform\.dense\.bias", 2.0 ** -18),
            (r"(opt|t5)_proj\.weight", 2.0 ** 10),
            (r"(opt|t5)_proj\.bias", 2.0 ** -8),
            (r"opt_model\..*(embed_tokens|embed_positions|out_proj|fc2)\..*", 2.0 ** -8),
            (r"t5_model\.(shared|.*(Attention\.o|DenseReluDense\.wo))\..*", 2.0 ** -8))),
    # stage 1 in one block and one layer, without gradients: what a wrong loss is compared with in seconds
    "small": dict(
        IMG=28,
        EVA_CFG=dict(img_size=28, embed_dim=24, depth=1, num_heads=2, mlp_ratio=2.0),
        BERT_CFG=dict(hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=28),
        NUM_QUERY=4, EMBED_DIM=8, PAIRS=4,
        SEED=dict(stage1=5212, pix=71, draw=5000),
        CASE_NAME="small_%s", ONLY=("stage1",), GRADIENTS=False),
}


def use_sizes(name):
    """Makes one row of SIZES the module's globals; nested dicts are completed from `tiny`."""
    chosen, base = SIZES[name], SIZES["tiny"]
    globals().update({k: {**v, **chosen.get(k, {})} if isinstance(v, dict) else chosen.get(k, v) for k, v in base.items()})
    globals()["SIZES_NAME"] = name
    globals()["PATCH"] = EVA_CFG["patch_size"]


def tiny_eva(img_size=None, drop_path_rate=0.0, use_checkpoint=False, precision="fp32"):
    cfg = dict(EVA_CFG, img_size=img_size or IMG, drop_path_rate=drop_path_rate)
    m = EVA.VisionTransformer(norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_checkpoint=use_checkpoint, **cfg)
    if precision == "fp16":
        EVA.convert_weights_to_fp16(m)
    return m


def tiny_clip(img_size=None, use_checkpoint=False, precision="fp32"):
    return CLIPVIT.VisionTransformer(**dict(CLIP_CFG, input_resolution=img_size or IMG))


def install_patches():
    transformers.BertTokenizer.from_pretrained = staticmethod(lambda *a, **k: bert_tokenizer())

    def bert_config(*a, **k):
        n = sum(1 for _ in open(os.path.join(TOK, "bert_vocab.txt")))
        return QF.BertConfig(vocab_size=n, **BERT_CFG)
    QF.BertConfig.from_pretrained = staticmethod(bert_config)
    if CROSS_FREQ != 2:      # Blip2OPT and Blip2T5 have no argument for it
        B2.Blip2Base.init_Qformer.__func__.__defaults__ = (CROSS_FREQ,)
    QF.BertLMHeadModel.from_pretrained = classmethod(lambda cls, name, config=None: cls(config))
    B2.create_eva_vit_g = tiny_eva
    B2.create_clip_vit_L = tiny_clip
    B2O.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *a, **k: opt_tokenizer())

    def opt_model(cls, name, torch_dtype=None):
        cfg = B2O.OPTConfig(vocab_size=len(opt_tokenizer()), **OPT_CFG)   # the real OPT pads its table (50265 -> 50272)
        return cls(cfg)
    B2O.OPTForCausalLM.from_pretrained = classmethod(opt_model)
    B2T.T5TokenizerFast = types.SimpleNamespace(from_pretrained=lambda *a, **k: t5_tokenizer())
    B2T.T5Config.from_pretrained = staticmethod(
        lambda *a, **k: B2T.T5Config(vocab_size=len(t5_tokenizer()), **T5_CFG))
    B2T.T5ForConditionalGeneration.from_pretrained = classmethod(lambda cls, name, config=None: cls(config))


DOUBLE = False      # --float64: the same float32-rounded weights and inputs, all arithmetic in float64


class Float64(torch.overrides.TorchFunctionMode):
    """Casts to float32 become casts to float64 (LAVIS's LayerNorm, T5's norm and softmax)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else getattr(func, "recorded", func)
        args = [torch.float64 if a is torch.float32 else a for a in args]
        out = func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})
        return out.double() if func is torch.full and out.is_floating_point() else out      # compute_sim_matrix's tables


def wide(x):
    return x.double() if DOUBLE else x


def rnd(g, shape):
    """float32 draws, also with --float64"""
    return torch.randn(shape, generator=g)


def q12(x):
    """multiples of 2**-12, exact in float32: keeps the files compressible"""
    return torch.round(x * 4096) / 4096


def randomise(model, seed):
    """Every parameter (tied ones once). Gains 1+0.25N, biases 0.2N, tables and tokens 0.6N (OPT's tied table 0.2N),
    matrices N/sqrt(fan_in) (times 2 for the Q-Former's cross-attention query/key, times 1.5 in OPT)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=lambda kv: kv[0]):
            n = rnd(g, p.shape)
            last = name.split(".")[-1]
            if name == "temp":
                p.fill_(TEMP)
                continue
            if p.ndim <= 1 and last == "weight":
                v = 1 + 0.25 * n
            elif p.ndim <= 1 and last != "class_embedding":
                v = 0.2 * n
            elif "embed" in last or "token" in last or "embeddings" in name or "embed_" in name or \
                    "relative_attention_bias" in name or name.endswith("shared.weight"):
                v = (0.2 if name == "opt_model.model.decoder.embed_tokens.weight" else 0.6) * n
            else:
                fan_in = int(np.prod(p.shape[1:]))
                v = n / math.sqrt(fan_in)
                if "crossattention.self.query" in name or "crossattention.self.key" in name:
                    v = 2 * v                             # sharp attention: the image must matter
                elif name.startswith("opt_model."):
                    v = 1.5 * v                           # else a tied random LM only repeats its input token
                elif name.endswith("Attention.q.weight"):   # T5 has no 1/sqrt(d)
                    v = v / math.sqrt(T5_CFG["d_kv"])
            p.copy_(q12(v) * next((scale for pattern, scale in SCALES if re.fullmatch(pattern, name)), 1.0))
    return model.double() if DOUBLE else model


def pixels(seed, n):
    g = torch.Generator().manual_seed(seed)
    return wide(torch.round(rnd(g, (max(n, PAIRS), 3, IMG, IMG)) * 16) / 16)[:n]


def build(cls, seed, vit_model="eva_clip_g", freeze_vit=True, **kw):
    torch.manual_seed(0)
    if issubclass(cls, B2Q.Blip2Qformer):
        kw["cross_attention_freq"] = CROSS_FREQ
    m = cls(vit_model=vit_model, img_size=IMG, drop_path_rate=0, use_grad_checkpoint=False, vit_precision="fp32",
            freeze_vit=freeze_vit, num_query_token=NUM_QUERY, max_txt_len=MAX_TXT, **kw)
    m = m.float()
    randomise(m, seed)
    m.eval()
    return m


# --------------------------------------------------------------------------------------
# 4. Output helpers
# --------------------------------------------------------------------------------------
def to_np(x):
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    return np.array(x, order="C")


class Case:
    def __init__(self, out, name, note):
        name = CASE_NAME % name
        self.dir = os.path.join(out, name)
        os.makedirs(self.dir, exist_ok=True)
        self.arrays, self.files = {}, {}
        self.meta = {"case": name, "note": note, "versions": VERSIONS, "arrays": {}, "files": {}}

    def add(self, name, value, desc):
        a = to_np(value)
        assert name not in self.arrays, name
        self.arrays[name] = a
        self.meta["arrays"][name] = {"shape": list(a.shape), "dtype": str(a.dtype), "what": desc}

    def set(self, **kw):
        self.meta.update(kw)

    def tensors(self, fname, d, desc):
        d = {k: v.detach().clone().contiguous() for k, v in sorted(d.items())}
        save_file(d, os.path.join(self.dir, fname))
        self.meta["files"][fname] = {"what": desc, "tensors": len(d), "elements": int(sum(v.numel() for v in d.values()))}

    def state_dict(self, model, fname="state_dict.safetensors", keep=None):
        sd = {k: v for k, v in model.state_dict().items() if keep is None or keep(k)}
        self.tensors(fname, sd, "state_dict(), LAVIS key names; tied tensors are written under both names")

    def done(self):
        np.savez_compressed(os.path.join(self.dir, "arrays.npz"), **self.arrays)
        with open(os.path.join(self.dir, "meta.json"), "w") as f:
            json.dump(self.meta, f, indent=1, sort_keys=True, default=str)
            f.write("\n")
        print("  %-18s %7.1f KB" % (os.path.basename(self.dir), sum(
            os.path.getsize(os.path.join(self.dir, x)) for x in os.listdir(self.dir)) / 1024), flush=True)


def _versions():
    from importlib.metadata import version
    d = {"python": sys.version.split()[0]}
    for p in ["salesforce-lavis", "torch", "transformers", "tokenizers", "timm", "einops", "omegaconf", "numpy",
              "pillow", "torchvision", "sentencepiece", "fairscale", "safetensors"]:
        try:
            d[p] = version(p)
        except Exception:
            d[p] = None
    d["transformers"] = transformers.__version__
    return d


VERSIONS = _versions()


def bert_cfg_of(model):
    c = model.Qformer.config
    keys = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
            "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "layer_norm_eps",
            "pad_token_id", "position_embedding_type", "encoder_width", "add_cross_attention", "cross_attention_freq",
            "query_length", "initializer_range", "tie_word_embeddings", "is_decoder"]
    return {k: getattr(c, k) for k in keys}


def common_cfg(model):
    d = {"vit": dict(EVA_CFG, norm_eps=1e-6, ln_vision_eps=model.ln_vision.eps), "qformer": bert_cfg_of(model),
         "num_query_token": NUM_QUERY, "max_txt_len": MAX_TXT, "image_size": IMG}
    if hasattr(model, "vision_proj"):
        d["embed_dim"] = model.vision_proj.out_features
        d["temp"] = float(model.temp)
    t = model.tokenizer
    d["bert_tokenizer"] = {"vocab": "../tokenizers/bert_vocab.txt", "len": len(t), "pad": t.pad_token_id, "cls": t.cls_token_id,
                           "sep": t.sep_token_id, "unk": t.unk_token_id, "mask": t.mask_token_id, "bos([DEC])": t.bos_token_id}
    return d


class Record:
    """Records torch.multinomial draws and F.cross_entropy inputs while active."""

    def __enter__(self):
        self.multi, self.ce = [], []
        self._m, self._c = torch.multinomial, F.cross_entropy

        def multinomial(w, n, *a, **k):
            with torch._C.DisableTorchFunction():        # --float64 draws as float32 does
                r = self._m(w.float(), n, *a, **k)
            self.multi.append((w.detach().clone(), r.detach().clone()))
            return r

        def cross_entropy(x, t, *a, **k):
            r = self._c(x, t, *a, **k)
            self.ce.append((x.detach().clone(), t.detach().clone(), k, r.detach().clone()))
            return r
        cross_entropy.recorded = self._c                 # torch calls F's name a second time under a TorchFunctionMode
        torch.multinomial, F.cross_entropy = multinomial, cross_entropy
        return self

    def __exit__(self, *a):
        torch.multinomial, F.cross_entropy = self._m, self._c


def hook_outputs(module, store, pick=lambda o: o):
    return module.register_forward_hook(lambda m, i, o: store.append(pick(o)))


class RecordGenerate:
    """Wraps module.generate: same call, but keeps ids, per-step scores, beam scores."""

    def __init__(self, module):
        self.module, self.calls = module, []

    def __enter__(self):
        self.orig = self.module.generate

        def generate(*a, **k):
            r = self.orig(*a, output_scores=True, return_dict_in_generate=True, **k)
            self.calls.append((k, r))
            return r.sequences
        self.module.generate = generate
        return self

    def __exit__(self, *a):
        del self.module.generate


def assert_robust(case, name, module, kwargs, sequences):
    """The ids survive 3e-5 relative noise on every weight and input; else the seed needs another value."""
    clean = [(p, p.detach().clone()) for p in module.parameters()]
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)

        def noisy(x):
            return x * (1 + 3e-5 * rnd(g, x.shape))
        with torch.no_grad():
            for p, x in clean:
                p.copy_(noisy(x))
            again = module.generate(**{k: noisy(v) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()})
            for p, x in clean:
                p.copy_(x)
        if not torch.equal(again, sequences):
            raise SystemExit("%s/%s: fragile: choose another seed" % (os.path.basename(case.dir), name))


def add_generated(case, name, rec, texts, what):
    k, r = rec.calls[-1]
    assert_robust(case, name, rec.module, k, r.sequences)
    case.add(name + ".sequences", r.sequences, what + ": token ids returned by transformers generate()")
    if getattr(r, "sequences_scores", None) is not None:
        case.add(name + ".sequences_scores", r.sequences_scores, what + ": final beam score of each row (sum log p / len**length_penalty)")
    else:
        s = torch.stack(r.scores, 1)                                   # [B, T, V] processed scores
        case.add(name + ".step_scores", s, what + ": processed next-token scores [batch, step, vocab] (-inf where a processor forbids)")
        top = s.topk(2, -1).values
        gap = (top[..., 0] - top[..., 1])
        case.add(name + ".top2_gap", gap, what + ": best minus second best score per row and step (how safe the argmax is)")
    case.meta.setdefault("texts", {})[name] = texts
    case.meta.setdefault("generate_kwargs", {})[name] = {
        kk: (vv if not isinstance(vv, torch.Tensor) else list(vv.shape)) for kk, vv in k.items()}


# --------------------------------------------------------------------------------------
# 5. Cases
# --------------------------------------------------------------------------------------
def boost_newline(m, c):
    """Adds ~c to the newline token's logit everywhere (through final_layer_norm's bias), so that some rows end."""
    with torch.no_grad():
        b = m.opt_model.model.decoder.final_layer_norm.bias
        m.opt_model.model.decoder.embed_tokens.weight[m.eos_token_id] += q12(c * b / (b * b).sum())
    return m


def case_eva_vit(out):
    m = tiny_eva().float()
    randomise(m, SEED["eva"]); m.eval()
    x = pixels(SEED["pix"], 2)
    c = Case(out, "eva_vit", "lavis.models.eva_vit.VisionTransformer, argument set of create_eva_vit_g, tiny. No final norm: ln_vision is outside.")
    c.set(config=dict(EVA_CFG, norm_eps=1e-6, mlp_hidden=int(EVA_CFG["embed_dim"] * EVA_CFG["mlp_ratio"])),
          seeds={"weights": SEED["eva"], "pixels": SEED["pix"]}, mode="eval")
    with torch.no_grad():
        y = m(x)
        blocks = m.get_intermediate_layers(x)
        pe = m.patch_embed(x)
    c.add("pixels", x, "images NCHW, already normalised")
    c.add("patch_embed", pe, "patch embedding before cls/pos [B, patches, width]")
    c.add("block_outputs", torch.stack(blocks), "output of each block [depth, B, 1+patches, width]")
    c.add("features", y, "model(pixels) [B, 1+patches, width] (cls first)")
    # position table interpolation used on loading
    grid = IMG // PATCH
    big = tiny_eva(img_size=IMG + PATCH).float()
    sd = {"pos_embed": m.pos_embed.detach().clone()}
    _quiet(EVA.interpolate_pos_embed, big, sd)
    c.add("pos_interp_%dx%d" % (grid + 1, grid + 1), sd["pos_embed"], "eva_vit.interpolate_pos_embed of state_dict pos_embed "
          "from %dx%d to %dx%d (bicubic, align_corners=False)" % (grid, grid, grid + 1, grid + 1))
    small = tiny_eva(img_size=IMG - PATCH).float()
    sd = {"pos_embed": m.pos_embed.detach().clone()}
    _quiet(EVA.interpolate_pos_embed, small, sd)
    c.add("pos_interp_%dx%d" % (grid - 1, grid - 1), sd["pos_embed"], "same, %dx%d to %dx%d" % (grid, grid, grid - 1, grid - 1))
    if GRADIENTS:       # of a fixed scalar
        g = torch.Generator().manual_seed(5)
        w = wide(torch.round(rnd(g, y.shape) * 64) / 64)
        c.add("loss_weight", w, "W in scalar loss sum(W * features)")
        m.zero_grad()
        xg = x.clone().requires_grad_(True)
        loss = (m(xg) * w).sum(); loss.backward()
        c.add("loss", loss, "sum(W * features)")
        c.tensors("grads.safetensors", {n: p.grad for n, p in m.named_parameters()}, "d loss / d parameter")
    c.state_dict(m)
    c.done()


def _quiet(fn, *a, **k):
    import contextlib
    with contextlib.redirect_stdout(io.StringIO()):
        return fn(*a, **k)


def case_clip_vit(out):
    m = tiny_clip().float()
    randomise(m, SEED["clip"]); m.eval()
    x = pixels(SEED["pix"], 2)
    c = Case(out, "clip_vit", "lavis.models.clip_vit.VisionTransformer, tiny. layers=%d gives layers-1 = %d blocks; no final norm." % (
        CLIP_CFG["layers"], CLIP_CFG["layers"] - 1))
    c.set(config=dict(CLIP_CFG, blocks=len(m.transformer.resblocks), ln_eps=m.ln_pre.eps), mode="eval",
          seeds={"weights": SEED["clip"], "pixels": SEED["pix"]})
    blocks, pre = [], []
    hs = [hook_outputs(b, blocks) for b in m.transformer.resblocks] + [hook_outputs(m.ln_pre, pre)]
    with torch.no_grad():
        y = m(x)
    for h in hs:
        h.remove()
    c.add("pixels", x, "images NCHW, already normalised")
    c.add("ln_pre", pre[0], "after ln_pre [B, 1+patches, width]")
    c.add("block_outputs", torch.stack([b.permute(1, 0, 2) for b in blocks]), "output of each block, batch first [blocks, B, 1+patches, width]")
    c.add("features", y, "model(pixels) [B, 1+patches, width] (class token first)")
    grid = IMG // CLIP_CFG["patch_size"]
    big = tiny_clip(img_size=IMG + CLIP_CFG["patch_size"])
    sd = {"positional_embedding": m.positional_embedding.detach().clone()}
    _quiet(CLIPVIT.interpolate_pos_embed, big, sd)
    c.add("pos_interp_%dx%d" % (grid + 1, grid + 1), sd["positional_embedding"], "clip_vit.interpolate_pos_embed from %dx%d to %dx%d "
          "(bicubic, align_corners=TRUE, unlike eva_vit)" % (grid, grid, grid + 1, grid + 1))
    c.state_dict(m)
    c.done()


def stage1_model(cls=None, **kw):
    return build(cls or B2Q.Blip2Qformer, SEED["stage1"], embed_dim=EMBED_DIM, **kw)


def case_qformer_modes(out):
    m = stage1_model()
    q = m.Qformer
    c = Case(out, "qformer_modes", "Blip2Qformer's Q-Former (Qformer.py BertLMHeadModel) in its four uses; image features are given, not from a ViT.")
    c.set(config=common_cfg(m), seeds={"weights": SEED["stage1"], "image_embeds": 21 + SEED["draw"]}, mode="eval",
          state_dict="state_dict.safetensors holds only Qformer.* and query_tokens" + (
              " (same values as stage1/state_dict.safetensors)" if ONLY is None else ""))
    g = torch.Generator().manual_seed(21 + SEED["draw"])
    B = 4
    tokens = 1 + (IMG // PATCH) ** 2
    img = wide(q12(rnd(g, (B, tokens, EVA_CFG["embed_dim"]))))
    tk = m.tokenizer([CAPTIONS[0], CAPTIONS[4], "", CAPTIONS[3]], padding="max_length", truncation=True,
                     max_length=MAX_TXT, return_tensors="pt")
    ids, att = tk.input_ids, tk.attention_mask
    iatt = torch.ones(img.shape[:-1], dtype=torch.long)
    qt = m.query_tokens.expand(B, -1, -1)
    c.add("image_embeds", img, "image features given to cross-attention [B, %d, vit width] (as after ln_vision)" % tokens)
    c.add("input_ids", ids, "texts, padded to %d; row 2 is the empty string ([CLS][SEP]), row 1 is truncated" % MAX_TXT)
    c.add("attention_mask", att, "1 on tokens, 0 on padding")
    with torch.no_grad():
        o = q.bert(query_embeds=qt, encoder_hidden_states=img, encoder_attention_mask=iatt, use_cache=True,
                   output_hidden_states=True, return_dict=True)
        c.add("query_only.hidden_states", torch.stack(o.hidden_states), "[layers+1, B, Q, hidden]; 0 is after embeddings LayerNorm, last is the output")
        past = o.past_key_values
        c.add("query_only.past_keys", torch.stack([p[0] for p in past]), "self-attention keys cached per layer [layers, B, heads, Q, head_dim]")
        c.add("query_only.past_values", torch.stack([p[1] for p in past]), "self-attention values cached per layer")
        # masked image tokens
        im2 = iatt.clone(); im2[1, 9:] = 0; im2[2, 1:] = 0
        o2 = q.bert(query_embeds=qt, encoder_hidden_states=img, encoder_attention_mask=im2, return_dict=True)
        c.add("image_mask_2", im2, "a second image mask with zeros")
        c.add("query_only.masked_image.last_hidden_state", o2.last_hidden_state, "query-only pass with image_mask_2")
        t = q.bert(ids, attention_mask=att, output_hidden_states=True, return_dict=True)
        c.add("text_only.hidden_states", torch.stack(t.hidden_states), "text-only pass [layers+1, B, T, hidden]; no cross-attention is used")
        itm_att = torch.cat([torch.ones(B, NUM_QUERY, dtype=torch.long), att], 1)
        i = q.bert(ids, query_embeds=qt, attention_mask=itm_att, encoder_hidden_states=img, encoder_attention_mask=iatt,
                   output_hidden_states=True, return_dict=True)
        c.add("itm.hidden_states", torch.stack(i.hidden_states), "queries then text, bidirectional [layers+1, B, Q+T, hidden]; queries come first")
        # ITG: as Blip2Qformer.forward does it
        dec = ids.clone(); dec[:, 0] = m.tokenizer.bos_token_id
        labels = dec.masked_fill(dec == m.tokenizer.pad_token_id, -100)
        lm = q(dec, attention_mask=itm_att, past_key_values=past, return_dict=True, labels=labels, output_hidden_states=True)
        c.add("itg.decoder_input_ids", dec, "input_ids with position 0 replaced by [DEC]")
        c.add("itg.labels", labels, "decoder_input_ids with padding -> -100 (shifted inside the model)")
        c.add("itg.hidden_states", torch.stack(lm.hidden_states), "[layers+1, B, T, hidden] of the text positions, causal, over cached query keys/values")
        c.add("itg.logits", lm.logits, "[B, T, vocab] unshifted")
        c.add("itg.loss", lm.loss, "mean over non-ignored targets, label_smoothing=0.1")
        per = q(dec, attention_mask=itm_att, past_key_values=past, return_dict=True, labels=labels, reduction="none")
        c.add("itg.loss_per_row", per.loss, "reduction='none': summed over positions per row, label_smoothing=0.1")
        # ITG in one uncached pass (UniLM style prefix mask): first generate() step
        un = q(dec, attention_mask=itm_att, query_embeds=qt, encoder_hidden_states=img, encoder_attention_mask=iatt,
               return_dict=True, is_decoder=True)
        c.add("itg.uncached_logits", un.logits, "same logits from one pass over [queries, text] with is_decoder=True (no cache)")
        c.meta["itg_cached_vs_uncached_max_abs_diff"] = float((un.logits - lm.logits).abs().max())
    c.state_dict(m, keep=lambda k: k.startswith("Qformer.") or k == "query_tokens")
    c.done()


def run_stage1(m, images, texts, seed):
    store = {k: [] for k in ["bert", "vproj", "tproj", "itm", "lm", "ln"]}
    hs = [hook_outputs(m.Qformer.bert, store["bert"], lambda o: o.last_hidden_state),
          hook_outputs(m.vision_proj, store["vproj"]), hook_outputs(m.text_proj, store["tproj"]),
          hook_outputs(m.itm_head, store["itm"]), hook_outputs(m.Qformer, store["lm"], lambda o: o.logits),
          hook_outputs(m.ln_vision, store["ln"])]
    m.zero_grad()
    torch.manual_seed(seed)
    with Record() as r:
        o = m({"image": images, "text_input": texts})
    for h in hs:
        h.remove()
    o.loss.backward()
    return o, r, store


def add_stage1_outputs(c, m, o, r, st, bs, pre=""):
    c.add(pre + "image_embeds", st["ln"][0], "ln_vision(visual_encoder(image)) [B, %d, vit width]" % st["ln"][0].shape[1])
    c.add(pre + "query_output", st["bert"][0], "query-only pass, last hidden state [B, Q, hidden]")
    c.add(pre + "text_output", st["bert"][1], "text-only pass, last hidden state [B, T, hidden]")
    c.add(pre + "image_feats", F.normalize(st["vproj"][0], dim=-1), "normalised vision_proj [B, Q, E]")
    c.add(pre + "text_feat", F.normalize(st["tproj"][0], dim=-1), "normalised text_proj of token 0 [B, E]")
    c.add(pre + "sim_i2t", r.ce[0][0], "image-to-text logits, max over queries, divided by temp [B, B(global)]")
    c.add(pre + "sim_t2i", r.ce[1][0], "text-to-image logits, divided by temp [B, B(global)]")
    c.add(pre + "itc_targets", r.ce[0][1], "class indices used by both ITC cross-entropies (label_smoothing=0.1)")
    c.add(pre + "weights_t2i", torch.stack([w for w, _ in r.multi[:bs]]), "multinomial weights for negative images: softmax(sim_t2i)+1e-4, own pair 0 [B, B(global)]")
    c.add(pre + "weights_i2t", torch.stack([w for w, _ in r.multi[bs:]]), "multinomial weights for negative texts: softmax(sim_i2t)+1e-4, own pair 0")
    c.add(pre + "neg_image_idx", torch.cat([d for _, d in r.multi[:bs]]), "drawn first: negative image of each text")
    c.add(pre + "neg_text_idx", torch.cat([d for _, d in r.multi[bs:]]), "drawn second: negative text of each image")
    c.add(pre + "itm_hidden", st["bert"][2], "ITM pass, last hidden state [3B, Q+T, hidden], rows: (img,txt) (negimg,txt) (img,negtxt)")
    c.add(pre + "itm_logits", r.ce[2][0], "mean over queries of itm_head [3B, 2]")
    c.add(pre + "itm_labels", r.ce[2][1], "B ones then 2B zeros")
    c.add(pre + "lm_logits", st["lm"][0], "captioning logits [B, T, vocab], unshifted")
    c.add(pre + "lm_labels_shifted", r.ce[3][1].reshape(bs, -1), "targets after the shift, -100 ignored [B, T-1]")
    for k in ["loss", "loss_itc", "loss_itm", "loss_lm"]:
        c.add(pre + k, getattr(o, k), k)
    c.add(pre + "loss_i2t", r.ce[0][3], "first ITC term"); c.add(pre + "loss_t2i", r.ce[1][3], "second ITC term")


def grads_of(m, only=None):
    return {n: p.grad for n, p in m.named_parameters() if p.grad is not None and (only is None or only(n))}


def single_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def case_stage1(out):
    m = stage1_model()
    x, caps, draw = pixels(SEED["pix"], PAIRS), CORPUS[:PAIRS], 77 + SEED["draw"]
    c = Case(out, "stage1", "Blip2Qformer.forward, %d pairs, one process, REAL gloo process group of world size 1 (dist.get_rank() is called "
             "unconditionally, so the 1.0.2 code cannot run without one). eval() mode, so every dropout is off; freeze_vit=True." % PAIRS)
    c.set(config=common_cfg(m), seeds={"weights": SEED["stage1"], "pixels": SEED["pix"], "multinomial": draw}, mode="eval",
          texts=caps)
    tk = m.tokenizer(caps, padding="max_length", truncation=True, max_length=MAX_TXT, return_tensors="pt")
    c.add("pixels", x, "images NCHW"); c.add("input_ids", tk.input_ids, "tokenised captions"); c.add("attention_mask", tk.attention_mask, "1 on tokens")
    single_process_group()
    o, r, st = run_stage1(m, x, caps, draw)
    add_stage1_outputs(c, m, o, r, st, PAIRS)
    ce_kw = [k for _, _, k, _ in r.ce]
    c.meta["cross_entropy_kwargs_in_order"] = [str(k) for k in ce_kw]
    if GRADIENTS:
        g1 = stage1_gradients(c, m, x, caps, draw, o, r)
    dist.destroy_process_group()
    if GRADIENTS:
        stage1_gathered_gradients(c, m, x, caps, draw, o, r, g1)
    c.state_dict(m)
    c.done()


def stage1_gradients(c, m, x, caps, draw, o, r):
    g1 = grads_of(m)
    c.meta["trainable"] = [n for n, p in m.named_parameters() if p.requires_grad]
    c.meta["trainable_without_grad"] = [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None]
    c.meta["frozen"] = [n for n, p in m.named_parameters() if not p.requires_grad]
    c.tensors("grads.safetensors", g1, "d loss / d parameter, LAVIS as distributed (gathered features are detached by concat_all_gather)")
    # ViT gradients with freeze_vit=False
    for p in m.visual_encoder.parameters():
        p.requires_grad_(True)
    o2, r2, _ = run_stage1(m, x, caps, draw)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(r.multi, r2.multi)) and torch.equal(o.loss, o2.loss)
    g2 = grads_of(m)
    c.meta["freeze_vit_false_other_grads_max_abs_diff"] = max(float((g2[k] - g1[k]).abs().max()) for k in g1)
    c.tensors("grads_vit.safetensors", {k: v for k, v in g2.items() if k.startswith("visual_encoder.")},
              "same loss, freeze_vit=False: gradients of visual_encoder.*")
    for p in m.visual_encoder.parameters():
        p.requires_grad_(False)
    return g1


def stage1_gathered_gradients(c, m, x, caps, draw, o, r, g1):
    # the not-initialised path: gathered features keep their graph
    c.meta["grads_gather_with_grad"] = ("no process group; only dist.get_rank/get_world_size are patched to 0/1. concat_all_gather then returns its "
        "argument itself, so the ITC loss also back-propagates through the 'all' side. Losses are the same, gradients are not.")
    gr, gw = dist.get_rank, dist.get_world_size
    dist.get_rank, dist.get_world_size = (lambda *a: 0), (lambda *a: 1)
    o3, r3, _ = run_stage1(m, x, caps, draw)
    dist.get_rank, dist.get_world_size = gr, gw
    assert all(torch.equal(a[1], b[1]) for a, b in zip(r.multi, r3.multi))
    c.meta["loss_diff_no_group"] = float((o3.loss - o.loss).abs())
    g3 = grads_of(m)
    diff = {k: v for k, v in g3.items() if (v - g1[k]).abs().max() > 1e-6}
    c.meta["grads_gather_with_grad_changed_tensors"] = len(diff)
    c.tensors("grads_gather_with_grad.safetensors", g3, "gradients when gathered features are NOT detached (see meta)")


def case_stage1_clip(out):
    """stage 1 with the CLIP ViT, losses only"""
    m = build(B2Q.Blip2Qformer, SEED["stage1_clip"], vit_model="clip_L", embed_dim=EMBED_DIM)
    x, caps, draw = pixels(SEED["pix"] + 1, CLIP_PAIRS), CORPUS[:CLIP_PAIRS], 78 + SEED["draw"]
    c = Case(out, "stage1_clip", "Blip2Qformer with vit_model='clip_L', %d pairs, world size 1 gloo group, eval(). Losses and intermediates, no gradients." % CLIP_PAIRS)
    cfg = common_cfg(m); cfg["vit"] = dict(CLIP_CFG, ln_vision_eps=m.ln_vision.eps)
    c.set(config=cfg, seeds={"weights": SEED["stage1_clip"], "pixels": SEED["pix"] + 1, "multinomial": draw}, mode="eval", texts=caps)
    tk = m.tokenizer(caps, padding="max_length", truncation=True, max_length=MAX_TXT, return_tensors="pt")
    c.add("pixels", x, "images NCHW"); c.add("input_ids", tk.input_ids, "tokenised captions"); c.add("attention_mask", tk.attention_mask, "1 on tokens")
    single_process_group()
    o, r, st = run_stage1(m, x, caps, draw)
    dist.destroy_process_group()
    add_stage1_outputs(c, m, o, r, st, CLIP_PAIRS)
    c.state_dict(m)
    c.done()


def ddp_worker(rank, world, store_path, result, out_unused):
    install_patches()
    dist.init_process_group("gloo", init_method="file://" + store_path, rank=rank, world_size=world)
    m = stage1_model()
    own = slice(rank * PAIRS // WORLD, (rank + 1) * PAIRS // WORLD)
    x = pixels(SEED["pix"], PAIRS)[own]
    o, r, st = run_stage1(m, x, CORPUS[own], 500 + SEED["draw"] + rank)
    torch.save({"loss": {k: getattr(o, k).detach() for k in ["loss", "loss_itc", "loss_itm", "loss_lm"]},
                "multi": r.multi, "ce": [(a, b) for a, b, _, _ in r.ce], "itm": st["bert"][2].detach(),
                "grads": grads_of(m)}, "%s.%d" % (result, rank))
    dist.barrier()
    dist.destroy_process_group()


def case_stage1_world(out):
    n = PAIRS // WORLD
    assert n * WORLD == PAIRS
    if WORLD == 2:
        shares = "TWO gloo processes, %d pairs each: rank 0 has pairs 0..%d and rank 1 pairs %d..%d of case " % (n, n - 1, n, PAIRS - 1)
    else:
        shares = "%d gloo processes, %d pairs each, in the order of case " % (WORLD, n)
    c = Case(out, "stage1_world%d" % WORLD, "Blip2Qformer.forward/backward in " + shares +
             "stage1 (same weights, pixels, captions). Not wrapped in DDP: gradients are per rank, before averaging; DDP would take their mean. "
             "GatherLayer's backward sums the image_embeds gradient over ranks.")
    c.set(seeds={"weights": SEED["stage1"], "pixels": SEED["pix"], "multinomial": "%d + rank" % (500 + SEED["draw"])}, mode="eval",
          state_dict="../stage1/state_dict.safetensors")
    with tempfile.TemporaryDirectory() as td:
        ps = [subprocess.Popen([sys.executable, os.path.abspath(__file__), "--ddp-rank", str(r), "--ddp-store", td + "/store",
                                "--ddp-result", td + "/r", "--tok", TOK, "--sizes", SIZES_NAME,
                                *(["--float64"] if DOUBLE else [])]) for r in range(WORLD)]
        assert all(p.wait() == 0 for p in ps)
        res = [torch.load("%s/r.%d" % (td, r), weights_only=False) for r in range(WORLD)]
    for rank, d in enumerate(res):
        p = "rank%d." % rank
        for k, v in d["loss"].items():
            c.add(p + k, v, k)
        c.add(p + "sim_i2t", d["ce"][0][0], "[%d, %d] global texts in rank order" % (n, PAIRS))
        c.add(p + "sim_t2i", d["ce"][1][0], "[%d, %d] global images in rank order" % (n, PAIRS))
        c.add(p + "itc_targets", d["ce"][0][1], "rank*%d + arange(%d)" % (n, n))
        c.add(p + "weights_t2i", torch.stack([w for w, _ in d["multi"][:n]]), "multinomial weights, negative image per text [%d, %d]" % (n, PAIRS))
        c.add(p + "weights_i2t", torch.stack([w for w, _ in d["multi"][n:]]), "multinomial weights, negative text per image [%d, %d]" % (n, PAIRS))
        c.add(p + "neg_image_idx", torch.cat([i for _, i in d["multi"][:n]]), "GLOBAL index of the negative image")
        c.add(p + "neg_text_idx", torch.cat([i for _, i in d["multi"][n:]]), "GLOBAL index of the negative text")
        c.add(p + "itm_logits", d["ce"][2][0], "[%d, 2]" % (3 * n))
    mean = {k: sum(d["grads"][k] for d in res) / WORLD for k in res[0]["grads"]}
    c.tensors("grads_mean.safetensors", mean, "mean over the %s ranks of each rank's gradient (what DDP's all-reduce gives)" % ("two" if WORLD == 2 else WORLD))
    pick = ["query_tokens", "temp", "vision_proj.weight", "text_proj.weight", "ln_vision.weight", "itm_head.weight"]
    c.tensors("grads_ranks.safetensors", {"rank%d.%s" % (r, k): res[r]["grads"][k] for r in range(WORLD) for k in pick},
              "each rank's own gradient, a few tensors")
    c.done()


def fake_loader(texts, images, bs):
    class L(list):
        pass
    l = L({"image": images[i:i + bs]} for i in range(0, len(images), bs))
    l.dataset = types.SimpleNamespace(text=texts, image=list(range(len(images))))
    return l


def case_itm_retrieval(out):
    m = stage1_model(B2ITM.Blip2ITM)
    x = pixels(SEED["pix"], ITM_IMAGES)
    caps = CORPUS[:ITM_IMAGES]
    c = Case(out, "itm_retrieval", "Blip2ITM (state dict identical to Blip2Qformer of case stage1): forward itm/itc, extract_features, compute_itm, compute_sim_matrix.")
    c.set(config=common_cfg(m), seeds={"weights": SEED["stage1"], "pixels": SEED["pix"]}, mode="eval", state_dict="../stage1/state_dict.safetensors",
          pixels="the first %d images of stage1/arrays.npz pixels" % ITM_IMAGES, texts=caps)
    notes = c.meta["behaviour"] = {}
    with torch.no_grad():
        itm, itc = [], []
        for i in range(ITM_IMAGES):
            s = {"image": x[i:i + 1], "text_input": [caps[i]]}
            itm.append(m(s, match_head="itm")); itc.append(m(s, match_head="itc"))
        c.add("itm_each", torch.cat(itm), "forward(match_head='itm') one pair at a time, logits [%d, 2]; no padding, truncated to max_txt_len" % ITM_IMAGES)
        c.add("itc_each", torch.cat(itc), "forward(match_head='itc') one pair at a time [%d, 1]: max over queries of cosine, NOT divided by temp" % ITM_IMAGES)
        same = ["a cat sitting on a sofa", "two dogs playing in the park", "the man riding a horse to"]
        n = [len(m.tokenizer(t).input_ids) for t in same]
        assert len(set(n)) == 1, n
        s = {"image": x[:3], "text_input": same}
        c.meta["texts_batch"] = same
        c.add("itm_batch", m(s, match_head="itm"), "three captions of equal token count in one call [3, 2]")
        c.add("itc_batch", m(s, match_head="itc"), "same [3, 1]")
        try:
            m({"image": x[:2], "text_input": caps[:2]}, match_head="itm"); notes["unequal_lengths_in_batch"] = "works"
        except Exception as e:
            notes["unequal_lengths_in_batch"] = "raises " + type(e).__name__
        s = {"image": x[:3], "text_input": caps[:3]}
        f = m.extract_features(s, mode="image")
        c.add("feat.image_embeds", f.image_embeds, "extract_features(mode='image').image_embeds, images 0..2 [3, Q, hidden]")
        c.add("feat.image_embeds_proj", f.image_embeds_proj, "image_embeds_proj, normalised [3, Q, E]")
        f = m.extract_features(s, mode="text")
        c.add("feat.text_embeds", f.text_embeds, "extract_features(mode='text').text_embeds, captions 0..2, padded to longest [3, T, hidden] (padding rows are garbage, kept)")
        c.add("feat.text_embeds_proj", f.text_embeds_proj, "every token projected and normalised [3, T, E]")
        f = m.extract_features(s, mode="multimodal")
        c.add("feat.multimodal_embeds", f.multimodal_embeds, "extract_features(mode='multimodal').multimodal_embeds: query positions only [3, Q, hidden]")
        tk = m.tokenizer(caps[:3], return_tensors="pt", padding=True)
        c.add("feat.input_ids", tk.input_ids, "ids used in text/multimodal (padding=True, NO truncation)"); c.add("feat.attention_mask", tk.attention_mask, "mask")
        # compute_itm
        tk = m.tokenizer(caps[:3], padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        qf, vf = m.forward_image(x[:3])
        c.add("compute_itm.input_ids", tk.input_ids, "padded to 35 as compute_sim_matrix does"); c.add("compute_itm.attention_mask", tk.attention_mask, "mask")
        c.add("compute_itm.score", m.compute_itm(vf, tk.input_ids, tk.attention_mask), "compute_itm: mean over queries of the raw class-1 LOGIT (no softmax) [3]")
        c.add("forward_text", m.forward_text(tk), "forward_text: hidden state of token 0 [3, hidden]")
        # retrieval
        texts = caps + ["a woman eating pizza at the table", "three birds over the sea", "what is the man riding"]
        tk = m.tokenizer(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        te = F.normalize(m.text_proj(m.forward_text(tk)))
        ie = F.normalize(m.vision_proj(m.forward_image(x)[0]), dim=-1)
        sims = torch.stack([(e @ te.t()).max(0)[0] for e in ie])
        c.meta["retrieval_texts"] = texts
        c.add("retrieval.input_ids", tk.input_ids, "%d texts, max_length=35 (hard-coded, not max_txt_len)" % len(texts)); c.add("retrieval.attention_mask", tk.attention_mask, "mask")
        c.add("retrieval.text_embeds", te, "[%d, E]" % len(texts)); c.add("retrieval.image_embeds", ie, "[%d, Q, E]" % ITM_IMAGES); c.add("retrieval.sims", sims, "max over queries of cosine [%d, %d]" % (ITM_IMAGES, len(texts)))
        i2t, t2i = _quiet(m.compute_sim_matrix, fake_loader(texts, x, 2), types.SimpleNamespace(k_test=K_TEST))
        c.add("retrieval.score_i2t", i2t, "compute_sim_matrix, k_test=%d: [%d, %d] ITM class-1 logit + cosine for the top %d, -100 elsewhere" % (K_TEST, ITM_IMAGES, len(texts), K_TEST))
        c.add("retrieval.score_t2i", t2i, "[%d, %d] the same text to image" % (len(texts), ITM_IMAGES))
    c.done()


def case_stage1_generate(out):
    m = stage1_model()
    with torch.no_grad():       # make [SEP] likely enough that some rows end early
        m.Qformer.cls.predictions.decoder.bias[m.tokenizer.sep_token_id] += GEN_SEP_BIAS
    x = pixels(SEED["pix"], GEN_IMAGES)
    c = Case(out, "stage1_generate", "Blip2Qformer.generate. Weights of case stage1 except Qformer.cls.predictions.decoder.bias[[SEP]] += %s." % GEN_SEP_BIAS)
    c.set(config=common_cfg(m), seeds={"weights": SEED["stage1"], "pixels": SEED["pix"]}, mode="eval", pixels="the first %d images of stage1 pixels" % GEN_IMAGES,
          state_dict="../stage1/state_dict.safetensors with Qformer.cls.predictions.bias and ...decoder.bias (one shared parameter) replaced by array decoder_bias")
    c.add("decoder_bias", m.Qformer.cls.predictions.decoder.bias, "Qformer.cls.predictions.decoder.bias used here")
    for name, kw in QFORMER_GENERATE:
        with RecordGenerate(m.Qformer) as r:
            texts = m.generate({"image": x}, **kw)
        add_generated(c, name, r, texts, "generate(%s)" % ", ".join("%s=%s" % kv for kv in kw.items()))
    with RecordGenerate(m.Qformer) as r:
        a = m.generate({"image": x}, num_beams=1, repetition_penalty=5.0)
    c.meta["repetition_penalty_is_ignored"] = a == c.meta["texts"]["greedy"]
    c.done()


class RecordForward:
    def __init__(self, module):
        self.module, self.calls = module, []

    def __enter__(self):
        self.orig = self.module.forward

        def forward(*a, **k):
            r = self.orig(*a, **k)
            self.calls.append((k, r))
            return r
        self.module.forward = forward
        return self

    def __exit__(self, *a):
        del self.module.forward


def opt_cfg(m):
    c = m.opt_model.config
    d = {k: getattr(c, k) for k in list(OPT_CFG) + ["vocab_size", "layerdrop", "attention_dropout"]}
    d["tokenizer"] = {"vocab": "../tokenizers/opt_vocab.json", "merges": "../tokenizers/opt_merges.txt", "len": len(m.opt_tokenizer),
                      "pad": m.opt_tokenizer.pad_token_id, "bos": m.opt_tokenizer.bos_token_id, "eos_token_id(newline)": m.eos_token_id}
    return d


def case_opt_stage2(out):
    m = boost_newline(build(B2O.Blip2OPT, SEED["opt"], opt_model="tiny", prompt=""), OPT_NEWLINE_BOOST)
    x = pixels(SEED["pix"], OPT_IMAGES)
    c = Case(out, "opt_stage2", "Blip2OPT.forward (three settings) with gradients, and generate(). eval(): dropout off everywhere. float32 (LAVIS loads OPT in float16).")
    c.set(config=dict(common_cfg(m), opt=opt_cfg(m)), seeds={"weights": SEED["opt"], "pixels": SEED["pix"]}, mode="eval",
          pixels="the first %d images of stage1 pixels" % OPT_IMAGES)
    c.add("pixels", x, "images NCHW")
    c.meta["trainable"] = [n for n, p in m.named_parameters() if p.requires_grad]
    c.meta["frozen_prefixes"] = sorted({n.split(".")[0] for n, p in m.named_parameters() if not p.requires_grad})
    caps = [t.lower().rstrip(".") for t in CAPTIONS[:OPT_IMAGES]]
    sets = {"no_prompt": ("", caps), "prompt": ("a photo of", ["a photo of " + t for t in caps]),
            "truncated": ("", [CAPTIONS[4], "zebra", CAPTIONS[1], "no", "a photo"][:OPT_IMAGES])}
    for name, (prompt, texts) in sets.items():
        m.prompt = prompt
        m.prompt_length = m.opt_tokenizer(prompt, return_tensors="pt").attention_mask.sum(1)   # as __init__ does
        m.zero_grad()
        st = []
        h = hook_outputs(m.opt_proj, st)
        with RecordForward(m.opt_model) as r:
            loss = m({"image": x, "text_input": texts})["loss"]
        h.remove()
        k, o = r.calls[0]
        p = name + "."
        c.meta.setdefault("texts", {})[name] = {"prompt": prompt, "prompt_length": int(m.prompt_length), "text_input": texts,
                                                "max_txt_len": m.max_txt_len}
        tk = m.opt_tokenizer([t + "\n" for t in texts], return_tensors="pt", padding="longest", truncation=True, max_length=m.max_txt_len)
        c.add(p + "opt_input_ids", tk.input_ids, "caption + newline, </s> first, right padded, truncated to max_txt_len")
        c.add(p + "inputs_opt", st[0], "opt_proj(query_output) [B, Q, opt hidden]")
        c.add(p + "inputs_embeds", k["inputs_embeds"], "[queries, text embeddings] [B, Q+T, opt hidden]")
        c.add(p + "attention_mask", k["attention_mask"], "[B, Q+T]")
        c.add(p + "labels", k["labels"], "[B, Q+T]; -100 on queries, padding and the first prompt_length text tokens; shifted inside OPT")
        c.add(p + "logits", o.logits, "OPT logits [B, Q+T, vocab]")
        c.add(p + "loss", loss, "mean over non-ignored shifted targets, no label smoothing")
        if not GRADIENTS:
            continue
        loss.backward()
        g = grads_of(m)
        c.meta.setdefault("trainable_without_grad", {})[name] = [n for n, q in m.named_parameters() if q.requires_grad and q.grad is None]
        if name != "truncated":
            c.tensors("grads_%s.safetensors" % name, g, "d loss / d parameter, setting " + name)
    m.prompt = ""
    if GENERATE:
        opt_generations(m, x, c)
    c.state_dict(m)
    c.done()


def opt_generations(m, x, c):
    notes = c.meta["behaviour"] = {}
    for pn, prompt in OPT_PROMPTS:
        for bn, kw in OPT_GENERATE:
            if bn.endswith("_lp") and pn == "p2":
                continue
            with RecordGenerate(m.opt_model) as r:
                texts = m.generate({"image": x, "prompt": prompt}, **kw)
            add_generated(c, "gen.%s.%s" % (pn, bn), r, texts, "prompt %r, %s" % (prompt, kw))
        c.meta.setdefault("prompts", {})[pn] = {"prompt": prompt, "ids": m.opt_tokenizer(prompt).input_ids}
    pn, kw = OPT_CAPTIONS
    prompt = dict(OPT_PROMPTS)[pn]
    with RecordGenerate(m.opt_model) as r:
        texts = m.generate({"image": x[:2], "prompt": prompt}, **kw)
    add_generated(c, "gen.%s.beam%d_caps%d" % (pn, kw["num_beams"], kw["num_captions"]), r, texts,
                  "prompt %r, num_beams=%d, num_captions=%d, 2 images" % (prompt, kw["num_beams"], kw["num_captions"]))
    try:
        with RecordGenerate(m.opt_model) as r:
            m.generate({"image": x[:2], "prompt": ["a photo of", "two"]}, num_beams=1)
        notes["list_of_prompts"] = ("accepted, but [prompt] * batch makes a list of PAIRS: every row is encoded as one text pair; input_ids "
                                    + str(r.calls[0][0]["input_ids"].tolist()))
    except Exception as e:
        notes["list_of_prompts"] = "raises %s: %s" % (type(e).__name__, str(e)[:200])
    try:
        m.generate({"image": x[:3], "prompt": ["a photo of", "two", "a red cat"]}, num_beams=1)
        notes["list_of_three_prompts"] = "accepted"
    except Exception as e:
        notes["list_of_three_prompts"] = "raises %s: %s" % (type(e).__name__, str(e)[:200])


def case_t5_stage2(out):
    m = build(B2T.Blip2T5, SEED["t5"], t5_model="tiny", prompt="")
    x = pixels(SEED["pix"], T5_IMAGES)
    c = Case(out, "t5_stage2", "Blip2T5.forward with gradients, generate(), predict_answers(). eval(): dropout off. float32 (LAVIS casts T5 to bfloat16).")
    tc = m.t5_model.config
    tok = m.t5_tokenizer
    c.set(config=dict(common_cfg(m), t5=dict({k: getattr(tc, k) for k in list(T5_CFG) + ["vocab_size", "dense_act_fn", "is_gated_act"]},
          tokenizer={"spm": "../tokenizers/t5_spiece.model", "len": len(tok), "pad": tok.pad_token_id, "eos": tok.eos_token_id, "unk": tok.unk_token_id})),
          seeds={"weights": SEED["t5"], "pixels": SEED["pix"]}, mode="eval", pixels="the first %d images of stage1 pixels" % T5_IMAGES)
    c.add("pixels", x, "images NCHW")
    c.meta["trainable"] = [n for n, p in m.named_parameters() if p.requires_grad]
    ti = ["a photo of", "question: what color is the sofa? answer:", "", "two"][:T5_IMAGES]
    to = ["a cat sitting on a red sofa", "red", "two dogs in the park near the lake at night by the trees under the sky", "a horse"][:T5_IMAGES]
    c.meta["texts_forward"] = {"text_input": ti, "text_output": to}
    m.zero_grad()
    st = []
    h = hook_outputs(m.t5_proj, st)
    with RecordForward(m.t5_model) as r:
        loss = m({"image": x, "text_input": ti, "text_output": to})["loss"]
    h.remove()
    k, o = r.calls[0]
    it = tok(ti, padding="longest", truncation=True, max_length=MAX_TXT, return_tensors="pt")
    ot = tok(to, padding="longest", truncation=True, max_length=MAX_TXT, return_tensors="pt")
    c.add("input_ids", it.input_ids, "text_input, eos appended, right padded, truncated to max_txt_len")
    c.add("output_ids", ot.input_ids, "text_output tokens")
    c.add("inputs_t5", st[0], "t5_proj(query_output) [B, Q, d_model]")
    c.add("inputs_embeds", k["inputs_embeds"], "[queries, text embeddings] [B, Q+T, d_model]")
    c.add("attention_mask", k["attention_mask"], "encoder mask [B, Q+T]")
    c.add("decoder_attention_mask", k["decoder_attention_mask"], "mask of the UNSHIFTED targets, applied to the shifted decoder inputs [B, To]")
    c.add("labels", k["labels"], "output ids, padding -> -100 [B, To]")
    c.add("encoder_last_hidden_state", o.encoder_last_hidden_state, "[B, Q+T, d_model]")
    c.add("logits", o.logits, "[B, To, vocab]")
    c.add("loss", loss, "mean over non-ignored targets, no smoothing")
    if GRADIENTS:
        loss.backward()
        c.tensors("grads.safetensors", grads_of(m), "d loss / d parameter")
        c.meta["trainable_without_grad"] = [n for n, q in m.named_parameters() if q.requires_grad and q.grad is None]
    if GENERATE:
        t5_generations(m, x, c)
    c.state_dict(m)
    c.done()


def t5_generations(m, x, c):
    tok = m.t5_tokenizer
    prompts = ["a photo of", "question: what color is the sofa? answer:", "question: how many dogs are in the park? short answer:", "what is"][:T5_IMAGES]
    c.meta["texts_generate"] = prompts
    gt = tok(prompts, padding="longest", return_tensors="pt")
    c.add("gen.input_ids", gt.input_ids, "prompts of different lengths, right padded (no truncation)"); c.add("gen.attention_mask", gt.attention_mask, "mask")
    for bn, kw in T5_GENERATE:
        with RecordGenerate(m.t5_model) as r:
            texts = m.generate({"image": x, "prompt": prompts}, **kw)
        add_generated(c, "gen." + bn, r, texts, "generate(prompt list, %s)" % kw)
    PQ = ["what color is the sofa", "how many dogs are in the park", "where is the cat", "what"][:T5_IMAGES]
    with RecordGenerate(m.t5_model) as r:
        texts = m.predict_answers({"image": x, "text_input": list(PQ)},
                                  prompt="question: {} short answer:", **T5_ANSWER)
    pt = tok(["question: %s short answer:" % t for t in PQ], padding="longest", return_tensors="pt")
    c.meta["texts_predict_answers"] = PQ
    c.add("predict_answers.input_ids", pt.input_ids, "formatted questions, right padded, no truncation"); c.add("predict_answers.attention_mask", pt.attention_mask, "mask")
    add_generated(c, "predict_answers", r, texts, ("predict_answers defaults: num_beams=5, max_len=10, min_len=1, length_penalty=-1" if not T5_ANSWER else
                  "predict_answers %s, else defaults" % T5_ANSWER) + ", prompt 'question: {} short answer:'")


def case_processors(out):
    from PIL import Image
    c = Case(out, "processors", "lavis.processors.blip_processors. Images are converted with PIL .convert('RGB') first, as the LAVIS data sets do.")
    H, W = 60, 100
    yy, xx = np.mgrid[0:H, 0:W]
    g = np.random.RandomState(3)
    ims = {}
    rgb = np.stack([xx * 255 // (W - 1), yy * 255 // (H - 1), (xx * 7 + yy * 5) % 256], -1).astype(np.uint8)
    ims["gradient_rgb_100x60"] = Image.fromarray(rgb)
    gray = ((np.sin(xx[:37, :53] / 3.0) + np.cos(yy[:37, :53] / 2.0)) * 60 + 127).astype(np.uint8)
    ims["gray_53x37"] = Image.fromarray(gray)
    rgba = g.randint(0, 256, (40, 40, 4)).astype(np.uint8)
    ims["rgba_noise_40x40"] = Image.fromarray(rgba)
    pal = Image.fromarray(np.kron(g.randint(0, 256, (6, 9, 3)), np.ones((16, 16, 1))).astype(np.uint8)).quantize(16)
    ims["palette_144x96"] = pal
    c.set(mean=[0.48145466, 0.4578275, 0.40821073], std=[0.26862954, 0.26130258, 0.27577711])
    for n, im in ims.items():
        c.add(n + ".raw", np.asarray(im), "PIL %s image as an array" % im.mode)
        conv = im.convert("RGB")
        c.add(n + ".rgb", np.asarray(conv), "after convert('RGB') [H, W, 3] uint8 (alpha is dropped, not composited)")
        for size in (28, 70):
            proc = BP.BlipImageEvalProcessor(image_size=size)
            c.add("%s.eval%d" % (n, size), proc(conv), "BlipImageEvalProcessor(image_size=%d) [3, %d, %d]: bicubic resize (aspect NOT kept), /255, normalise" % (size, size, size))
            c.add("%s.resized%d" % (n, size), np.asarray(proc.transform.transforms[0](conv)), "its first step only, uint8")
    # train transform with its random draws recorded
    import torchvision.transforms as T
    proc = BP.Blip2ImageTrainProcessor(image_size=28)
    rec = {}
    orig = T.RandomResizedCrop.get_params

    def get_params(img, scale, ratio):
        r = orig(img, scale, ratio); rec["crop"] = r; return r
    T.RandomResizedCrop.get_params = staticmethod(get_params)
    boxes, flips, outs = [], [], []
    for s in range(4):
        torch.manual_seed(s)
        y = proc(ims["gradient_rgb_100x60"])
        boxes.append(rec["crop"])
        top, left, h, w = rec["crop"]
        plain = proc.normalize(T.functional.to_tensor(T.functional.resized_crop(
            ims["gradient_rgb_100x60"], top, left, h, w, (28, 28), T.InterpolationMode.BICUBIC)))
        same, flipped = torch.equal(plain, y), torch.equal(plain.flip(-1), y)
        assert same != flipped
        flips.append(flipped); outs.append(y)
    T.RandomResizedCrop.get_params = staticmethod(orig)
    c.add("train28.crop", np.array(boxes), "Blip2ImageTrainProcessor(image_size=28) on gradient_rgb: drawn crop (top, left, height, width), seeds 0..3")
    c.add("train28.flip", np.array(flips), "whether the horizontal flip was drawn")
    c.add("train28.out", torch.stack(outs), "outputs [4, 3, 28, 28]")
    nasty = ["A photo of a cat.", "  Two   dogs\tplaying\n\nin the park!  ", "\"Quoted\" (parens) #hash; semi: colon~ *star*",
             "it's a dog's life, isn't it?", "", "...", "Caf\u00e9 na\u00efve \u4e2d\u6587 \U0001F600 \u0130stanbul", "trailing newline\n\n",
             "\n leading newline", "a" * 80, " ".join("w%d" % i for i in range(60)), "ends with dot . ", "semi;colon:no.space!here",
             "tabs\tand\u00a0nbsp  double", "question: what (color) is it?? ", "~", "UPPER Case MIX.", " . a . b . "]
    rows = []
    for t in nasty:
        rows.append({"in": t, "caption": BP.BlipCaptionProcessor()(t), "caption_prompt": BP.BlipCaptionProcessor(prompt="a photo of ")(t),
                     "caption_max5": BP.BlipCaptionProcessor(max_words=5)(t), "question": BP.BlipQuestionProcessor()(t),
                     "question_max5": BP.BlipQuestionProcessor(max_words=5)(t)})
    with open(os.path.join(c.dir, "text.json"), "w") as f:
        json.dump(rows, f, indent=1, ensure_ascii=True); f.write("\n")
    c.meta["files"]["text.json"] = {"what": "BlipCaptionProcessor / BlipQuestionProcessor outputs for each nasty text"}
    c.done()


def case_optim(out):
    from omegaconf import OmegaConf
    c = Case(out, "optim", "RunnerBase.optimizer (real property, RunnerBase made without __init__) and LinearWarmupCosineLRScheduler.")

    def groups(model, **run):
        r = RB.RunnerBase.__new__(RB.RunnerBase)
        r.config = types.SimpleNamespace(run_cfg=OmegaConf.create(dict(weight_decay=0.05, init_lr=1e-4, device="cpu", distributed=False, **run)))
        r._model = r._wrapped_model = model
        r._device, r._optimizer = torch.device("cpu"), None
        opt = r.optimizer
        names = {id(p): n for n, p in model.named_parameters()}
        return opt, {"type": type(opt).__name__, "betas": list(opt.defaults["betas"]), "eps": opt.defaults["eps"],
                     "groups": [{"weight_decay": g["weight_decay"], "lr": g["lr"], "names": [names[id(p)] for p in g["params"]]} for g in opt.param_groups],
                     "not_in_optimizer": sorted(n for n, p in model.named_parameters() if not p.requires_grad)}
    res = {}
    for name, mk in [("stage1_freeze_vit", lambda: stage1_model()), ("stage1_train_vit", lambda: stage1_model(freeze_vit=False)),
                     ("stage1_clip_train_vit", lambda: build(B2Q.Blip2Qformer, 1, vit_model="clip_L", freeze_vit=False, embed_dim=EMBED_DIM)),
                     ("opt_stage2", lambda: build(B2O.Blip2OPT, 1, opt_model="tiny")),
                     ("t5_stage2", lambda: build(B2T.Blip2T5, 1, t5_model="tiny"))]:
        res[name] = groups(mk())[1]
    with open(os.path.join(c.dir, "groups.json"), "w") as f:
        json.dump(res, f, indent=1); f.write("\n")
    sched = {}
    for name, kw, ep, it in [
            ("brief", dict(max_epoch=5, min_lr=1e-5, init_lr=1e-4, warmup_steps=10, warmup_start_lr=1e-6), 5, 20),
            ("no_warmup", dict(max_epoch=3, min_lr=0.0, init_lr=1e-5), 3, 4),
            ("warmup_longer_than_epoch", dict(max_epoch=3, min_lr=1e-5, init_lr=1e-4, warmup_steps=30, warmup_start_lr=1e-6), 3, 20)]:
        opt = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        s = OPTIMS.LinearWarmupCosineLRScheduler(optimizer=opt, **kw)
        lrs = []
        for e in range(ep):
            for i in range(it):
                s.step(cur_epoch=e, cur_step=i)
                lrs.append(opt.param_groups[0]["lr"])
        sched[name] = {"args": kw, "epochs": ep, "iters_per_epoch": it, "lr": lrs}
    with open(os.path.join(c.dir, "lr.json"), "w") as f:
        json.dump(sched, f, indent=1); f.write("\n")
    c.meta["files"].update({"groups.json": {"what": "parameter names per AdamW group"},
                            "lr.json": {"what": "lr in force at each iteration (scheduler.step(cur_epoch, cur_step) is called before the forward)"}})
    # a short training run: real optimizer, real scheduler, dropout off
    m = stage1_model()
    opt, _ = groups(m)
    s = OPTIMS.LinearWarmupCosineLRScheduler(optimizer=opt, max_epoch=3, min_lr=1e-5, init_lr=1e-3, warmup_steps=2, warmup_start_lr=1e-6)
    single_process_group()
    x = pixels(SEED["pix"], PAIRS)
    rows = {k: [] for k in ["loss", "loss_itc", "loss_itm", "loss_lm", "lr", "neg_image_idx", "neg_text_idx"]}
    for step in range(6):
        s.step(cur_epoch=step // 3, cur_step=step % 3)
        o, r, _ = run_stage1(m, x, CORPUS[:PAIRS], 900 + SEED["draw"] + step)
        opt.step(); opt.zero_grad()
        for k in ["loss", "loss_itc", "loss_itm", "loss_lm"]:
            rows[k].append(float(getattr(o, k)))
        rows["lr"].append(opt.param_groups[0]["lr"])
        rows["neg_image_idx"].append(torch.cat([d for _, d in r.multi[:PAIRS]]).tolist())
        rows["neg_text_idx"].append(torch.cat([d for _, d in r.multi[PAIRS:]]).tolist())
    dist.destroy_process_group()
    for k, v in rows.items():
        c.add("train." + k, np.array(v), "6 steps on the stage1 batch, 3 iterations per epoch, max_epoch=3, init_lr=1e-3, warmup 2 from 1e-6, min_lr 1e-5, weight decay 0.05, eval() mode: " + k)
    moved = {n: p for n, p in m.named_parameters() if p.requires_grad}
    c.tensors("params_after_6_steps.safetensors", moved, "trainable parameters after the 6 steps (start: ../stage1/state_dict.safetensors)")
    c.done()


CASES = [case_eva_vit, case_clip_vit, case_qformer_modes, case_stage1, case_stage1_clip, case_stage1_world, case_itm_retrieval,
         case_stage1_generate, case_opt_stage2, case_t5_stage2, case_processors, case_optim]


def main():
    global TOK
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", default=os.path.join(HERE, "goldens"))
    ap.add_argument("--sizes", choices=SIZES, default="tiny")
    ap.add_argument("--case", nargs="*", default=None)
    ap.add_argument("--float64", action="store_true", help="the same weights and inputs, computed in float64")
    ap.add_argument("--ddp-rank", type=int); ap.add_argument("--ddp-store"); ap.add_argument("--ddp-result"); ap.add_argument("--tok")
    a = ap.parse_args()
    use_sizes(a.sizes)
    if a.float64:
        globals()["DOUBLE"] = True
        Float64().__enter__()
    if a.ddp_rank is not None:
        TOK = a.tok
        return ddp_worker(a.ddp_rank, WORLD, a.ddp_store, a.ddp_result, None)
    TOK = os.path.join(a.out, "tokenizers")
    os.makedirs(TOK, exist_ok=True)
    make_bert_vocab(os.path.join(TOK, "bert_vocab.txt"))
    make_opt_bpe(os.path.join(TOK, "opt_vocab.json"), os.path.join(TOK, "opt_merges.txt"))
    make_t5_spm(os.path.join(TOK, "t5_spiece.model"))
    install_patches()
    with open(os.path.join(a.out, "patches.json"), "w") as f:
        json.dump(PATCHES, f, indent=1); f.write("\n")
    for fn in CASES:
        name = "stage1_world%d" % WORLD if fn is case_stage1_world else fn.__name__[5:]
        if name in (a.case or ONLY or [name]):
            fn(a.out)


if __name__ == "__main__":
    main()
