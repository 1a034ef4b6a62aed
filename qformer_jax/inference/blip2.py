"""A trained run in use: captions, answers, features and similarities from pictures.

    >>> model = Blip2.load('runs/instruct')
    >>> model.ask(['cat.jpg'], ['what animal is this?'])
    ['cat']

Pictures are encoded once: every method also takes what `encode_images` returned, and those that write also what
`encode_queries` did; a model with a `cache` finds on the disk what it made of a picture before. Work goes through in
batches of fixed shapes (`batch_size` rows or a smaller power of two, prompts padded to multiples of 8), so a handful of
compilations serves any input.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .. import boxes, config
from ..data import prefetch
from ..data.cache import Cache
from ..data.grounding_tokenizer import with_location_tokens
from ..data.pack import BYTE_BPE, WORDPIECE
from ..data.tokenizers import LmTokenizer, TextTokenizer, clean_caption, prompt_ids, question_prompt
from ..errors import UserError
from ..models import blip2, connectors, query_count
from ..objectives import contrastive
from ..rules import flatten
from ..runs import import_export, run_dir
from ..training.stages import STAGES
from ..typing import Bool, Float, Int, Params
from . import decode, forward, stream
from . import quantize as quantization
from . import rank as ranking
from .feature_cache import FeatureCache
from .generate import GenerationConfig, Text, row_keys
from .inputs import ImageFeatures, Picture, Pictures, QueryOutputs, is_array, read, stack_pictures
from .prompts import as_many, left_padded, target_rows, with_eos

CAPTION, ANSWER = GenerationConfig(max_new_tokens=20), GenerationConfig(max_new_tokens=10)


@dataclass(frozen=True)
class Blip2:
    """A model, its parameters and its tokenizers."""

    run: config.Run
    params: Params
    folder: Path
    """Where the tokenizers lie."""
    batch_size: int = 64
    """Rows that go through the device together."""
    cache: Cache | None = None
    """Where what it makes of pictures is kept (inference/feature_cache.py); None: nowhere."""

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[Path],
        which: Literal['last', 'best'] = 'last',
        batch_size: int = 64,
        weights: quantization.Weights | None = None,
        cache: str | Path | None = None,
        queries: int = 0,
        connector: type | str | Path | None = None,
    ) -> 'Blip2':
        """Read a finished run, or published checkpoints (one or more, as `qformer convert` takes them).

        With `weights`, the frozen towers are in fewer bits from the start: the device never holds them as they were.
        `cache` is a folder, which need not exist, for what the model makes of pictures. `queries`: so many, the first
        ones, are used (0: all), which a run with nested queries is trained for. `connector`: the class of the run's
        connector, or its .py file, which is run, where that is none of the package's.
        Raises UserError when something is missing, unfinished, damaged or unknown.
        """
        sources = [Path(source)] if isinstance(source, str | Path) else list(source)
        cache = None if cache is None else Cache(Path(cache))
        if len(sources) == 1 and ((sources[0] / run_dir.RUN).is_file() or not sources[0].exists()):
            own = connectors.from_file(Path(connector)) if isinstance(connector, str | Path) else connector
            done = run_dir.finished(sources[0], own)
            run, params = run_dir.for_use(done, which)
            model = cls(run, quantization.on_device(flatten(params).items(), weights), done.folder, batch_size, cache)
        else:
            found = import_export.read(sources)
            params = quantization.on_device(import_export.read_finite(found.tensors), weights)
            model = cls(found.run, params, sources[0], batch_size, cache)
        return model.with_queries(queries) if queries else model

    def with_queries(self, count: int) -> 'Blip2':
        """Return the model with its first `count` queries alone; raises UserError where it has fewer."""
        c = query_count.resized(self.run.model, count)
        if count > (there := self.run.model.qformer.num_queries):
            raise UserError(
                f'{count} queries: this run has {there}, and more are a new start (qformer convert --queries)'
            )
        table = query_count.resize(self.params['qformer']['query_token'], count)
        params = self.params | {'qformer': self.params['qformer'] | {'query_token': table}}
        return dataclasses.replace(self, run=dataclasses.replace(self.run, model=c), params=params)

    def quantize(self, weights: quantization.Weights) -> 'Blip2':
        """Return the model with its frozen towers in fewer bits; raises UserError where they are already."""
        return dataclasses.replace(self, params=quantization.on_device(flatten(self.params).items(), weights))

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f'batch_size {self.batch_size} must be at least 1')

    @functools.cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The Q-Former's; raises UserError if the run has none."""
        return TextTokenizer.load(self._tokenizer(WORDPIECE, 'text'))

    @functools.cached_property
    def lm_tokenizer(self) -> LmTokenizer:
        """The language model's; raises UserError if the run has none."""
        return with_location_tokens(LmTokenizer.load(self._tokenizer(BYTE_BPE, 'lm')), self.run.model)

    def _tokenizer(self, name: str, kind: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise UserError(
                f"'{self.folder}' has no tokenizer for this text ({name}): qformer convert it with --{kind}-tokenizer"
            )
        return path

    @property
    def model(self) -> blip2.Blip2Module:
        """The network."""
        return blip2.Blip2Module(self.run.model, jnp.dtype(self.run.training.dtype))

    @functools.cached_property
    def feature_cache(self) -> FeatureCache:
        """What is kept of pictures; only of a model with a cache."""
        return FeatureCache(self.run, self.params, self.cache)

    def encode_images(self, pictures: Pictures | QueryOutputs, keep: bool = True) -> ImageFeatures:
        """Return the frozen features of pictures; feature arrays (.npy files too) are taken as they are.

        Those that are kept are read; with `keep` False no others are added.
        """
        if isinstance(pictures, ImageFeatures):
            return pictures
        if isinstance(pictures, QueryOutputs):
            raise UserError('queries hold no features: give pictures, or what `encode` returned')
        if not len(pictures):
            raise UserError('no picture given')
        if self.cache is None or not self.run.model.vit or any(map(is_array, pictures)):
            return ImageFeatures.join(list(self.iter_features(pictures)))
        see = lambda some: (row for image_features in self.iter_features(some) for row in image_features.rows())  # noqa: E731
        return ImageFeatures.of(list(self.feature_cache.fetch('features', pictures, see, keep)))

    def iter_features(self, pictures: Iterable[Picture]) -> Iterator[ImageFeatures]:
        """Yield what `encode_images` returns, `batch_size` pictures at a time; the next ones are decoded meanwhile."""
        size = self.run.model.vit.image_size if self.run.model.vit else 0
        for batch in prefetch.batches(pictures, self.batch_size, functools.partial(read, size=size)):
            kinds = {array.dtype == np.uint8 for array in batch}
            if len(kinds) > 1:
                raise UserError('pictures and feature arrays do not go through together: give one kind at a time')
            see = functools.partial(self._in_batches, forward.vision_features)
            yield ImageFeatures(*see(*stack_pictures(batch))) if kinds == {True} else self._pad_features(batch)

    def encode_queries(self, pictures: Pictures | QueryOutputs) -> ImageFeatures | QueryOutputs:
        """Return what answers need of pictures: queries, or features where a connector or a text comes in."""
        self.needs('lm')
        if self.run.objective.instruction_aware or self.run.model.connector:
            return self.encode_images(pictures)
        if isinstance(pictures, QueryOutputs):
            return pictures.checked(self.run.model.qformer)
        if not len(pictures):
            raise UserError('no picture given')
        if self.cache is not None and not isinstance(pictures, ImageFeatures):
            rows = self.feature_cache.fetch(
                'queries', pictures, lambda some: self._queries([self.encode_images(some, keep=False)])
            )
        else:
            rows = self._queries([pictures] if isinstance(pictures, ImageFeatures) else self.iter_features(pictures))
        return QueryOutputs(np.stack(list(rows)))

    def _queries(self, parts: Iterable[ImageFeatures]) -> Iterator[Float['Q D']]:
        for image_features in parts:
            yield from self._in_batches(forward.query_features, image_features.features, image_features.mask)

    def _pad_features(self, arrays: Sequence[np.ndarray]) -> ImageFeatures:
        width = self.run.model.feature_width
        for array in arrays:
            if array.ndim != 2 or array.shape[1] != width:
                hint = ' (or give pictures)' if self.run.model.vit else ''
                raise UserError(f'features must be [P, {width}] for this run, not {list(array.shape)}{hint}')
        return ImageFeatures.of([array.astype(np.float32) for array in arrays])  # of files in float16, read as they are

    def caption(
        self, pictures: Pictures | QueryOutputs, settings: GenerationConfig = CAPTION, key: jax.Array | None = None
    ) -> list[str]:
        """Return a caption of each picture, from the run's caption prompt; a stage-1 run's Q-Former writes it itself.

        With `settings.num_return` > 1: so many captions of the first picture, best first, then those of the second...
        A temperature needs a `key`; what is drawn for a picture depends on its place in the list, not on the others.
        """
        if STAGES[self.run.stage].text_side:
            image_features = self.encode_images(pictures)
            settings = with_eos(settings, self.text_tokenizer.sep_id)
            texts = self._write(
                decode.with_qformer, settings, key, self.text_tokenizer, image_features.features, image_features.mask
            )
        else:
            prompts = [self.run.data.caption_prompt[0]] * len(pictures)
            texts = self.generate(pictures, prompts, settings, key)
        return [text.text for text in texts]

    def ask(
        self,
        pictures: Pictures | QueryOutputs,
        questions: Sequence[str],
        settings: GenerationConfig = ANSWER,
        key: jax.Array | None = None,
    ) -> list[str]:
        """Return the answers to questions, one a picture; an instruction-aware Q-Former reads the question too."""
        return [text.text for text in self.generate(pictures, self.question_prompts(questions), settings, key)]

    def rank(
        self,
        pictures: Pictures | QueryOutputs,
        questions: Sequence[str],
        candidates: Sequence[str] | Sequence[Sequence[str]],
        rule: ranking.Rule = 'sum',
    ) -> Float['N C']:
        """Return how likely (log p, nats) each candidate is as the answer to the question about its picture.

        `candidates` are the same for all questions, or a list a question; what a shorter list lacks scores -inf. The
        rules are those of `inference/rank.py`.
        """
        self.needs('lm')
        as_many(pictures, questions, 'question')
        prompts = self.question_prompts(questions)
        shared = all(isinstance(candidate, str) for candidate in candidates)
        each = [candidates] * len(questions) if shared else candidates
        ids, candidate_mask = ranking.rows(self.lm_tokenizer, prompts, each)
        score = functools.partial(ranking.scores, rows_at_once=self.batch_size)
        inputs = *self._read(pictures, prompts, ids.shape[2]), ids, candidate_mask
        total, tokens = self._in_batches(score, *inputs), candidate_mask.sum(axis=2)
        if np.isnan(total).any():
            raise UserError(
                'the log p of an answer is not a number: the weights of this run are broken, or the features'
            )
        return np.where(tokens, total / np.maximum(tokens, 1) if rule == 'mean' else total, -np.inf)

    def question_prompts(self, questions: Sequence[str]) -> list[str]:
        """Return the run's first prompt with each question in it, cleaned as in training."""
        return [question_prompt(self.run.data.question_prompt[0], question) for question in questions]

    def generate(
        self,
        pictures: Pictures | QueryOutputs,
        prompts: Sequence[str],
        settings: GenerationConfig = CAPTION,
        key: jax.Array | None = None,
    ) -> list[Text]:
        """Return what the language model writes after [picture, prompt]; the Q-Former reads the prompt if it can.

        Texts end at `settings.end_ids`, or at the tokenizer's end token where those are not given. A temperature needs
        a `key`.
        """
        as_many(pictures, prompts, 'prompt')
        inputs = self._read(pictures, prompts, settings.max_new_tokens)
        settings = with_eos(settings, self.lm_tokenizer.end_id)
        return self._write(decode.with_lm, settings, key, self.lm_tokenizer, *inputs)

    def stream(
        self,
        picture: Picture | ImageFeatures | QueryOutputs,
        prompt: str,
        settings: GenerationConfig = CAPTION,
        key: jax.Array | None = None,
    ) -> Iterator[str]:
        """Yield what `generate` returns for one picture, in pieces, as it is written."""
        if settings.num_beams > 1 or settings.num_return > 1:
            raise UserError('a text that is streamed is written once: num_beams and num_return must be 1')
        settings = with_eos(settings, self.lm_tokenizer.end_id)
        given = picture if isinstance(picture, ImageFeatures | QueryOutputs) else [picture]
        inputs = self._read(given, [prompt], settings.max_new_tokens)
        read = stream.begin(self.model, self.params, *inputs, settings=settings)
        keys = None if key is None else row_keys(key, 1)
        ids = (int(token[0]) for token, _ in stream.tokens(self.model, self.params, read, settings, keys))
        yield from stream.pieces(self.lm_tokenizer, itertools.takewhile(lambda i: i not in settings.end_ids, ids))

    def _write(
        self,
        writer: Callable,
        settings: GenerationConfig,
        key: jax.Array | None,
        tokenizer: TextTokenizer | LmTokenizer,
        *arrays: np.ndarray | blip2.Prefix,
    ) -> list[Text]:
        if key is not None:
            arrays += (np.asarray(row_keys(key, len(jax.tree.leaves(arrays)[0]))),)
        written = self._in_batches(functools.partial(writer, settings=settings), *arrays)
        rows = written.tokens.reshape(-1, settings.max_new_tokens)
        texts = [tokenizer.decode(row[~np.isin(row, settings.end_ids)]).strip() for row in rows]
        return [Text(*pair) for pair in zip(texts, map(float, written.scores.reshape(-1)), strict=True)]

    def losses(
        self,
        pictures: Pictures | QueryOutputs,
        prompts: Sequence[str],
        targets: Sequence[str],
    ) -> tuple[Float['N T'], Bool['N T']]:
        """Return the loss (nats) of each token of the targets after [picture, prompt], and which tokens they are."""
        self.needs('lm')
        ids, mask, target = target_rows(self.lm_tokenizer, prompts, targets)
        prefix = self.soft_prefix(pictures, prompts)
        return self._in_batches(forward.target_losses, prefix, ids, mask, target), target

    def soft_prefix(self, pictures: Pictures | QueryOutputs, prompts: Sequence[str]) -> blip2.Prefix:
        """Return the soft prefixes; an instruction-aware Q-Former reads the prompts (InstructBLIP, section 2.3)."""
        self.needs('lm')
        if not len(pictures):
            raise UserError('no picture given')
        reads = self.run.objective.instruction_aware
        text = self.text_arrays(list(map(boxes.plain, prompts))) if reads else []
        if self.cache is None and self._are_pixels(pictures):
            return self._prefix_of_pixels(pictures, text)
        encoded = self.encode_queries(pictures)
        if isinstance(encoded, QueryOutputs):
            return self._in_batches(forward.project, encoded.queries)
        return self._in_batches(forward.soft_prefix, encoded.features, encoded.mask, *text)

    def _are_pixels(self, pictures: Pictures | QueryOutputs) -> bool:
        given = isinstance(pictures, ImageFeatures | QueryOutputs) or self.run.model.vit is None
        return not given and not any(map(is_array, pictures))

    def _prefix_of_pixels(self, pictures: Sequence[Picture], text: Sequence[np.ndarray]) -> blip2.Prefix:
        """Return the soft prefixes by one compiled function a batch; the next batch is decoded meanwhile."""
        size, parts, start = self.run.model.vit.image_size, [], 0
        for batch in prefetch.batches(pictures, self.batch_size, functools.partial(read, size=size)):
            image, frames = (*stack_pictures(batch), None)[:2]
            rows = [array[start : start + len(batch)] for array in text] or [None, None]
            parts.append(self._in_batches(forward.soft_prefix_of_pictures, image, frames, *rows))
            start += len(batch)
        return blip2.Prefix.join(parts)

    def features(
        self,
        pictures: Pictures | None = None,
        texts: Sequence[str] | None = None,
        mode: Literal['image', 'text', 'multimodal'] = 'image',
    ) -> np.ndarray:
        """Return unit vectors [N, Q, E] of pictures, [N, E] of texts, or the queries that read both [N, Q, D]."""
        self.needs('qformer') if mode == 'multimodal' else self._needs_heads()
        if mode == 'image':
            image_features = self.encode_images(pictures)
            return self._in_batches(forward.embed_image, image_features.features, image_features.mask)
        text = self.text_arrays([clean_caption(t) for t in texts])
        if mode == 'text':
            return self._in_batches(forward.embed_text, *text)
        image_features = self.encode_images(pictures)
        return self._in_batches(forward.read_both, image_features.features, image_features.mask, *text)

    def similarity(self, pictures: Pictures, texts: Sequence[str], by: Literal['itc', 'itm'] = 'itc') -> Float['I C']:
        """Return how well each picture fits each text: ITC cosine, or the ITM logit of "matched".

        Ask a stage-1 run: later stages move the queries, and their heads stay as stage 1 left them.
        """
        image_features = self.encode_images(pictures)
        if by == 'itc':
            image, text = self.features(image_features), self.features(texts=texts, mode='text')
            return np.asarray(contrastive.similarity(jnp.asarray(image), jnp.asarray(text)))
        rows, columns = np.divmod(np.arange(len(image_features) * len(texts)), len(texts))
        text = self.text_arrays([clean_caption(t) for t in texts])
        return self.match(image_features, text, rows, columns)[:, 1].reshape(len(image_features), len(texts))

    def match(
        self, image_features: ImageFeatures, text: Sequence[np.ndarray], pictures: Int['N'], texts: Int['N']
    ) -> Float['N 2']:
        """Return the ITM logits (not matched, matched) of the pairs of picture `pictures[n]` and text `texts[n]`.

        `text` is what `text_arrays` gives.
        """
        self._needs_heads()
        match = functools.partial(forward.match, self.model, self.params)
        return forward.in_pairs(
            match, self.batch_size, (image_features.features, image_features.mask), text, pictures, texts
        )

    def text_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return ids and mask [N, T] of cleaned texts for the Q-Former."""
        rows = [self.text_tokenizer.encode(text, self.run.data.max_text) for text in texts]
        return [np.stack(column) for column in zip(*rows, strict=True)]

    def padded_prompts(self, prompts: Sequence[str], beside: int) -> tuple[Int['N T'], Bool['N T']]:
        """Return the ids of prompts, padded at the left to one length, and which of them exist.

        Padding takes no room from what stands `beside` a prompt (queries, new tokens): with 40 positions and 13 beside,
        prompts of up to 24 tokens are padded to a multiple of 8, longer ones to 27.
        """
        rows = [prompt_ids(self.lm_tokenizer, prompt) for prompt in prompts]
        if self.run.model.gates and not all(rows):
            raise UserError(
                'a prompt is empty, and nothing stands before it: give it a text that the first word can follow'
            )
        positions = self.run.model.lm.position_limit
        return left_padded(rows, self.lm_tokenizer.pad_id, None if positions is None else positions - beside)

    def _read(
        self, pictures: Pictures | QueryOutputs, prompts: Sequence[str], new: int
    ) -> tuple[blip2.Prefix, Int['N T'], Bool['N T']]:
        """Return what the language model reads: prefixes and padded prompts, with room for `new` tokens."""
        prefix = self.soft_prefix(pictures, prompts)
        beside = blip2.prefix_length(self.run.model, prefix) + new - 1  # the last token is not read
        return prefix, *self.padded_prompts(prompts, beside)

    def _in_batches(self, function: Callable, *arrays: np.ndarray | blip2.Prefix | None) -> Any:
        return forward.in_batches(functools.partial(function, self.model, self.params), self.batch_size, *arrays)

    def needs(self, part: Literal['lm', 'qformer']) -> None:
        """Raise UserError when the run lacks a part of the model."""
        if getattr(self.run.model, part) is None:
            later = {'lm': "a 'stage2' or 'instruct' run", 'qformer': "a run from 'stage1' on"}[part]
            raise UserError(f"this is a '{self.run.stage}' run, which has no {part}: give {later}")

    def _needs_heads(self) -> None:
        self.needs('qformer')
        side = self.run.model.qformer.text_side
        if side not in ('full', 'retrieval'):
            raise UserError(
                f"this Q-Former has no heads of ITC and ITM (its text side is '{side}'): give a 'stage1' run"
            )
