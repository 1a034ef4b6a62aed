"""Tiny tokenizers of the kinds that real language models have, as their files hold them."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = [
    '▁a',
    '▁red',
    '▁green',
    '▁blue',
    '▁yellow',
    '▁square',
    '▁circle',
    '▁yes',
    '▁no',
    '▁what',
    '▁color',
    '▁is',
    '▁it',
]
LETTERS = [*'▁abcdefghijklmnopqrstuvwxyz?']


def t5(states: bool = True) -> Tokenizer:
    """Return a sentencepiece Unigram as converted for T5; with `states`, its file says that `</s>` ends a text."""
    scores = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), *((x, -9.0) for x in LETTERS), *((x, -2.0) for x in WORDS)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(['<pad>', '</s>', '<unk>', '<extra_id_0>'])
    if states:
        tokenizer.post_processor = processors.TemplateProcessing('$A </s>', special_tokens=[('</s>', 1)])
    return tokenizer


def llama(first: str = '') -> Tokenizer:
    """Return a sentencepiece BPE as converted for Llama and Vicuna; `first`: what its file puts before a text."""
    pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *LETTERS]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token='<unk>', byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    strip = decoders.Strip(' ', 1, 0)
    blanks = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(blanks)
    tokenizer.add_special_tokens(['<unk>', '<s>', '</s>'])
    if first:
        special = [(first, tokenizer.token_to_id(first))]
        tokenizer.post_processor = processors.TemplateProcessing(f'{first} $A', special_tokens=special)
    return tokenizer


def smollm() -> Tokenizer:
    """Return a byte BPE without `</s>`, as SmolLM2's."""
    vocab = [
        '<|endoftext|>',
        '<|im_start|>',
        '<|im_end|>',
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        'Ġr',
        'Ġre',
        'Ġred',
    ]
    bpe = models.BPE({word: i for i, word in enumerate(vocab)}, [('Ġ', 'r'), ('Ġr', 'e'), ('Ġre', 'd')])
    tokenizer = Tokenizer(bpe)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(vocab[:3])
    return tokenizer
