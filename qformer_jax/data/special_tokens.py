"""Which ids stand around a language model's texts: read off its vocabulary, and off what its file says.

    OPT            </s> prompt target \\n         byte BPE with `</s>`; LAVIS ends texts with a newline
    SmolLM2        prompt target \\n              byte BPE without: nothing comes first
    Llama, Vicuna  <s> prompt target </s>        sentencepiece BPE
    T5             prompt </s> | target </s>     sentencepiece Unigram: encoder | decoder

InstructBLIP's Vicuna begins with `</s>`, and its file says so.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer, models

from ..errors import UserError

_NEWLINE = 'Ċ'  # how GPT-2's byte alphabet writes "\n"


@dataclass(frozen=True)
class SpecialTokens:
    """The ids around a text that are none of its words."""

    begin: tuple[int, ...]
    """Before a prompt."""
    close: tuple[int, ...]
    """After a prompt: T5's encoder was taught texts that end with `</s>`."""
    end: int
    """After what the model writes."""
    pad: int
    """In places that masks hide."""
    blank: str
    """What joins prompt and target: a byte BPE ties a blank to the word after it, sentencepiece adds its own."""


def special_tokens_of(tokenizer: Tokenizer) -> SpecialTokens:
    """Return the marks of a language model's tokenizer; raises UserError when it is of no kind listed above."""
    ends, newline = (tokenizer.token_to_id(name) for name in ('</s>', _NEWLINE))
    if ends is None and newline is None:
        raise UserError("this vocabulary lacks the token '</s>': a language model's is a byte BPE (OPT, SmolLM2) or "
                        "sentencepiece (Llama, T5), which a WordPiece (BERT) is not")  # fmt: skip
    begin, close = _stated(tokenizer) or _customary(tokenizer, ends)
    end, blank = (ends, '') if newline is None else (newline, ' ')
    pads = (tokenizer.token_to_id(name) for name in ('<pad>', '[PAD]'))
    return SpecialTokens(begin, close, end, next((pad for pad in pads if pad is not None), end), blank)


def _stated(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the ids that the file itself puts before and after a text, or None when it puts none."""
    bare, whole = (tokenizer.encode('a', add_special_tokens=framed).ids for framed in (False, True))
    if len(bare) == len(whole):
        return None
    begin = whole.index(bare[0]) if bare else len(whole)
    return tuple(whole[:begin]), tuple(whole[begin + len(bare) :])


def _customary(tokenizer: Tokenizer, ends: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what each kind of model was taught to see, where its file does not say."""
    if isinstance(tokenizer.model, models.Unigram):
        return (), (ends,)
    first = ends if tokenizer.token_to_id(_NEWLINE) is not None else tokenizer.token_to_id('<s>')
    return (() if first is None else (first,)), ()
