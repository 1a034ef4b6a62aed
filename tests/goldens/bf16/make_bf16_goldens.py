#!/usr/bin/env python3
"""What PyTorch itself writes in bfloat16: greedy search of LAVIS's Blip2OPT and Blip2T5 at the committed sizes.

    python make_bf16_goldens.py            # 3 s, in the environment of ../lavis/README.md; writes greedy.npz beside this file
"""
import os
import sys
import tempfile

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
LAVIS = os.path.join(HERE, "..", "lavis")
sys.path.insert(0, LAVIS)
import make_lavis_goldens as lavis  # noqa: E402

OUT = {}


def everything(m, lm, proj):
    """Q-Former, projection and language model in bfloat16; the image features are rounded where they enter."""
    m.Qformer.bfloat16()
    proj.bfloat16()
    lm.bfloat16()
    m.query_tokens.data = m.query_tokens.data.bfloat16()

    def rounded(module, args, kwargs):
        return args, {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}
    m.Qformer.bert.register_forward_pre_hook(rounded, with_kwargs=True)


def language_model(lm, proj, prefix):
    """Only the language model in bfloat16; it reads the recorded float32 prefix, rounded."""
    lm.bfloat16()
    proj.register_forward_hook(lambda *_: torch.tensor(prefix).bfloat16())


def record(name, lm, recorded, generate):
    """Ids, the gap between the two best scores, and how far bfloat16 moves a score from the recorded float32 one."""
    with lavis.RecordGenerate(lm) as r:
        generate()
    k, result = r.calls[-1]
    scores = torch.stack(result.scores, 1).float()
    top = scores.topk(2, -1).values
    ids, theirs = result.sequences.numpy(), recorded["sequences"]
    noise = np.full(scores.shape[:2], np.nan, np.float32)
    start = ids.shape[1] - scores.shape[1]
    for row in range(len(ids)):
        for step in range(min(scores.shape[1], recorded["step_scores"].shape[1])):
            if not np.array_equal(ids[row, :start + step], theirs[row, :start + step]):
                break                               # another text from here on
            noise[row, step] = np.abs(scores[row, step].numpy() - recorded["step_scores"][row, step]).max()
    OUT.update({name + ".sequences": ids, name + ".top2_gap": (top[..., 0] - top[..., 1]).numpy(), name + ".noise": noise})
    print("%-14s same ids as float32: %s; smallest gap %.4f, noise up to %.4f" % (
        name, ids.shape == theirs.shape and np.array_equal(ids, theirs), OUT[name + ".top2_gap"].min(), np.nanmax(noise)))


def opt():
    case = np.load(os.path.join(LAVIS, "opt_stage2", "arrays.npz"))
    x = lavis.pixels(lavis.SEED["pix"], lavis.OPT_IMAGES)
    for part in ("whole", "lm"):
        m = lavis.boost_newline(lavis.build(lavis.B2O.Blip2OPT, lavis.SEED["opt"], opt_model="tiny", prompt=""), lavis.OPT_NEWLINE_BOOST)
        if part == "whole":
            everything(m, m.opt_model, m.opt_proj)
        else:
            language_model(m.opt_model, m.opt_proj, case["no_prompt.inputs_opt"])
        for p, prompt in lavis.OPT_PROMPTS:
            recorded = {k: case["gen.%s.greedy.%s" % (p, k)] for k in ("sequences", "step_scores")}
            record("opt.%s.%s" % (part, p), m.opt_model, recorded,
                   lambda: m.generate({"image": x, "prompt": prompt}, num_beams=1, max_length=12))


def t5():
    case = np.load(os.path.join(LAVIS, "t5_stage2", "arrays.npz"))
    x = lavis.pixels(lavis.SEED["pix"], lavis.T5_IMAGES)
    prompts = ["a photo of", "question: what color is the sofa? answer:", "question: how many dogs are in the park? short answer:"]
    for part in ("whole", "lm"):
        m = lavis.build(lavis.B2T.Blip2T5, lavis.SEED["t5"], t5_model="tiny", prompt="")
        if part == "whole":
            everything(m, m.t5_model, m.t5_proj)
        else:
            language_model(m.t5_model, m.t5_proj, case["inputs_t5"])
        recorded = {k: case["gen.greedy.%s" % k] for k in ("sequences", "step_scores")}
        record("t5.%s" % part, m.t5_model, recorded, lambda: m.generate({"image": x, "prompt": prompts}, num_beams=1, max_length=12))


if __name__ == "__main__":
    lavis.use_sizes("tiny")
    with tempfile.TemporaryDirectory() as lavis.TOK:
        lavis.make_bert_vocab(os.path.join(lavis.TOK, "bert_vocab.txt"))
        lavis.make_opt_bpe(os.path.join(lavis.TOK, "opt_vocab.json"), os.path.join(lavis.TOK, "opt_merges.txt"))
        lavis.make_t5_spm(os.path.join(lavis.TOK, "t5_spiece.model"))
        lavis.install_patches()
        opt()
        t5()
    np.savez_compressed(os.path.join(HERE, "greedy.npz"), **OUT)
