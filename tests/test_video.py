"""Videos: one long sequence of features with a time a frame, from pixels to words."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image

from qformer_jax import cli, config
from qformer_jax.data import pictures as picture_files
from qformer_jax.data import pipeline, transforms
from qformer_jax.data.dataset import Dataset
from qformer_jax.errors import UserError
from qformer_jax.export import runner
from qformer_jax.export.artifacts import write
from qformer_jax.inference import inputs
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.models import blip2
from qformer_jax.models.temporal_embedding import TemporalEmbedding
from qformer_jax.training import init_params, loop, losses
from qformer_jax.training.loss_context import LossContext
from qformer_jax.training.stages import STAGES

TIME = config.TimeConfig(frames=3, patches=2)
QFORMER = dataclasses.replace(small.QFORMER, feature_width=6, vocab_size=50, dropout=0.0)
RESAMPLER = config.ConnectorConfig('resampler', feature_width=6, tokens=4, width=16, depth=2, heads=2, mlp_width=32)
LM = dataclasses.replace(small.OPT, vocab_size=50)
DRAW = np.random.default_rng(0)
FEATURES = DRAW.standard_normal((2, 6, 6), dtype=np.float32)  # three frames of two patches
MASK = np.arange(6)[None] < np.array([[6], [4]])


def timed(features: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return what a table of times 0, 1 and 2 adds to features of one column."""
    params = {'frame': jnp.arange(3.0)[:, None]}
    return np.asarray(TemporalEmbedding(TIME, 1).apply({'params': params}, features, mask) - features)[..., 0]


def test_each_frame_has_its_time_and_a_longer_video_lies_between():
    """Five frames on a table of three: 0, 0.5, 1, 1.5, 2; beside them, padded, one of two frames."""
    mask = np.arange(10)[None] < np.array([[10], [4]])
    got = timed(np.zeros((2, 10, 1), np.float32), mask)
    np.testing.assert_allclose(got[0], np.repeat([0, 0.5, 1, 1.5, 2], 2), atol=1e-6)
    np.testing.assert_allclose(got[1, :4], [0, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(timed(np.zeros((1, 6, 1), np.float32), np.ones((1, 6), bool))[0], [0, 0, 1, 1, 2, 2])


def model(kind: str, time: config.TimeConfig | None = TIME) -> tuple[blip2.Blip2Module, dict]:
    """Return a model whose parameters are all random."""
    parts = {'qformer': QFORMER if kind == 'qformer' else None, 'connector': RESAMPLER if kind != 'qformer' else None}
    c = config.Blip2Config(vit=None, lm=LM, time=time, **parts)
    draw = np.random.default_rng(1)
    return blip2.Blip2Module(c), jax.tree.map(lambda x: jnp.float32(draw.standard_normal(x.shape) / 2), blip2.shapes(c))


@pytest.mark.parametrize('kind', ['qformer', 'resampler'])
def test_every_token_reads_every_frame(kind):
    """Flamingo flattens time and space: one token's gradient reaches all patches of all frames that exist."""
    made, params = model(kind)

    def token(features):
        return jnp.sin(made.apply({'params': params}, features, MASK, method='soft_prefix').vectors[:, 1]).sum()

    reached = jnp.abs(jax.grad(token)(FEATURES)).sum(axis=-1) > 0
    np.testing.assert_array_equal(reached, MASK)


@pytest.mark.parametrize('kind', ['qformer', 'resampler'])
def test_order_is_seen_with_times_only(kind):
    """Frames 0, 1, 2 and frames 2, 1, 0 are the same set."""
    turned = FEATURES.reshape(2, 3, 2, 6)[:, ::-1].reshape(2, 6, 6)
    for time in (TIME, None):
        made, params = model(kind, time)
        see = lambda features, made=made, params=params: made.apply(  # noqa: E731
            {'params': params}, features, np.ones((2, 6), bool), method='soft_prefix'
        )
        differ = np.abs(see(FEATURES).vectors - see(turned).vectors).max()
        assert differ > 1e-3 if time else differ < 1e-5


def test_times_learn_in_stage_1_too():
    made, params = model('qformer')
    text = jnp.array([[2, 7, 8, 3], [2, 9, 10, 3]])
    batch = {
        'features': FEATURES,
        'feature_mask': jnp.asarray(MASK),
        'text': text,
        'text_mask': text > 0,
        'image_id': np.arange(2),
    }

    def loss(time):
        bound = made.bind({'params': params | {'time': time}})
        return losses.stage1(bound, batch, LossContext(jax.random.key(0), config.Objective(itm=0.0, itg=0.0)))[0]

    gradient = jax.jit(jax.grad(loss))(params['time'])['frame']
    assert (jnp.abs(gradient).max(axis=1) > 0).all()


def write_videos(folder: Path) -> Path:
    """Write a data set of videos: a square comes or goes, in two or three frames that say nothing alone."""
    for split, copies in (('train', 12), ('test', 4)):
        lines = []
        for number in range(2 * copies):
            way, colour, length = (
                ('comes', 'goes')[number % 2],
                list(small.COLOURS)[number // 2 % 4],
                2 + number % 4 // 2,
            )
            frames = ['full'] + ['empty'] * (length - 1)
            frames = frames[::-1] if way == 'comes' else frames
            (folder / split / str(number)).mkdir(parents=True)
            for i, frame in enumerate(frames):
                picture = small.draw_picture(colour, 'square')
                if frame == 'empty':
                    picture.paste((128, 128, 128), (0, 0, *picture.size))
                picture.save(folder / split / str(number) / f'{i}.png')
            names = [f'{number}/{i}.png' for i in range(length)]
            questions = [{'question': 'what does it do?', 'answers': [way]}]
            lines.append(json.dumps({'frames': names, 'caption': f'{colour} {way}', 'questions': questions}))
        (folder / split / 'captions.jsonl').write_text('\n'.join(lines))
    return folder


@pytest.fixture(scope='module')
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('videos')
    cli.run(['data', 'pack', 'folder', str(folder / 'data'), '--path', str(write_videos(folder / 'source'))])
    return folder / 'data'


def recipe(data: Path, stage: str = 'instruct', steps: int = 100) -> config.Run:
    """Return a run over videos whose resampler knows the time; the towers learn too."""
    run = small.change(small.recipe(stage, data, steps), 'optimizer', rate_rules=(('.*', 1.0),), peak_rate=3e-3)
    connector = dataclasses.replace(RESAMPLER, feature_width=0)
    return small.change(run, 'model', qformer=None, connector=connector, time=config.TimeConfig(frames=2))


@pytest.fixture(scope='module')
def run(videos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('runs') / 'run'
    loop.train(recipe(videos), folder)
    return folder


def test_a_video_answers_what_no_frame_tells(run, videos, tmp_path):
    """Two frames or three, from records, from folders and as pictures, and from the export."""
    answering, records = Blip2.load(run, batch_size=4), list(Dataset.open(videos).source('test'))
    image_features = answering.encode_images([record.model_input for record in records])
    assert set(image_features.mask.sum(axis=1)) == {2 * 5, 3 * 5}
    ask = lambda pictures: answering.ask(pictures, ['what does it do?'] * len(pictures))  # noqa: E731
    answers = ask(image_features)
    assert answers == [record.answers[0][0] for record in records]
    backwards = ask([record.frames[::-1] for record in records])
    assert backwards == [{'comes': 'goes', 'goes': 'comes'}[answer] for answer in answers]
    folder = tmp_path / 'video'
    folder.mkdir()
    for number, frame in enumerate(records[2].frames):
        (folder / f'{number}.png').write_bytes(frame)
    assert ask([folder, str(folder)]) == [answers[2]] * 2
    write(answering, tmp_path / 'out', 'mark')
    assert runner.Served(tmp_path / 'out').write(folder, 'what does it do?') == answers[2]
    assert small.keeping(answering, tmp_path / 'cache').ask([folder, records[0].frames], ['what does it do?'] * 2) == [
        answers[2],
        answers[0],
    ]


def test_encoded_videos_train_as_their_frames_do(run, videos, tmp_path):
    """Features of all frames in the frames' places: the same prefix, whatever is padded."""
    cli.run(['data', 'encode', str(videos), str(tmp_path / 'seen'), '--vit', str(run)])
    encoded = Dataset.open(tmp_path / 'seen')
    assert encoded.feature_shape == (3 * 5, small.VIT.width) and not encoded.longest_video
    rows = []
    for data in (videos, tmp_path / 'seen'):
        completed = init_params.complete(recipe(data), dataset := Dataset.open(data))
        batch = next(pipeline.batches(completed, STAGES[completed.stage].row_format, dataset, 'train', training=True))
        given = {name: batch.get(name) for name in ('image', 'features', 'feature_mask', 'frame_mask')}
        bound = Blip2.load(run)
        prefix = lambda made, given=given: made.soft_prefix(*made.vision_features(**given))  # noqa: E731
        rows.append(bound.model.apply({'params': bound.params}, method=prefix).vectors)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)


def test_frames_come_by_their_numbers(tmp_path):
    """1, 2, ..., 10, 11 and not 1, 10, 11, 2; the loader of an exported folder sorts alike."""
    names = ['1.png', '02.png', '2.png', '9.png', '10.png', '11.png', 'a2b9.png', 'a2b10.png', 'a10b1.png', 'b.png']
    for number, name in enumerate(names):
        Image.new('RGB', (8, 8), (20 * number, 0, 0)).save(tmp_path / name)
    (tmp_path / '.DS_Store').write_bytes(b'hidden')
    assert inputs.read(tmp_path, 8)[:, 0, 0, 0].tolist() == [20 * number for number in range(len(names))]
    assert inputs.read(str(tmp_path), 8).shape == (len(names), 8, 8, 3)
    assert [file.name for file in runner.frames(tmp_path)] == names
    (tmp_path / 'more').mkdir()
    with pytest.raises(UserError, match="holds the folder 'more'; a video is a folder of its frames alone"):
        inputs.read(tmp_path, 8)
    with pytest.raises(runner.Refused, match="holds the folder 'more'"):
        runner.frames(tmp_path)
    with pytest.raises(UserError, match='no picture in it; a video is a folder of its frames'):
        inputs.read(tmp_path / 'more', 8)
    with pytest.raises(runner.Refused, match='no picture in it'):
        runner.frames(tmp_path / 'more')


@pytest.mark.parametrize(
    'picture, size, message',
    [
        ([], 8, 'a video without a frame'),
        ([np.zeros((8, 8, 3), np.uint8)], 8, 'a picture is a file, its bytes or a PIL image, not ndarray'),
        ('absent.png', 8, 'absent.png: no such picture'),
        ('a\0.png', 8, 'no such picture'),
        ('a' * 300, 8, 'no such picture'),
        ('a' * 300 + '.npy', 8, 'no such array'),
        (b'picture', 0, 'no vision tower: give feature arrays'),
        ('.', 0, 'no vision tower: give feature arrays'),
        (np.full((2, 3), 1e39), 8, 'the features: holds values that are not finite in float32'),
        (np.full((2, 3), np.nan, np.float32), 8, 'the features: holds values that are not finite'),
        (np.ones((2, 3), np.int32), 8, 'the features: expected floats .P, V., found int32'),
        (np.array([[1, None]]), 8, 'found object'),
        (np.ones(3), 8, 'found float64 .3.'),
        (np.ones((8, 8, 3)), 8, 'found float64 .8, 8, 3.'),
    ],
)
def test_what_is_no_picture_and_no_features_is_refused(picture, size, message):
    with pytest.raises(UserError, match=message):
        inputs.read(picture, size)


def test_features_are_read_in_float32():
    for dtype in (np.float64, np.float32, np.float16, jnp.bfloat16, '>f4'):
        got = inputs.read(np.full((2, 3), 1.5).astype(dtype), 8)
        assert got.dtype == np.float32 and (got == 1.5).all()


def test_frames_are_cropped_and_mirrored_alike():
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture = picture_files.decode(small.draw_picture('red', 'square'))
    still = [transforms.Image.fromarray(noise)] * 3
    for seed in range(4):
        frames = transforms.train_images(still, 16, (0.3, 0.8), True, np.random.default_rng(seed))
        assert (frames == frames[:1]).all()
    frames = transforms.train_images([still[0], picture], 16, (0.3, 0.8), True, np.random.default_rng(0))
    assert frames.shape == (2, 16, 16, 3) and (frames[0] != frames[1]).any()


def test_what_time_needs_is_said(arrays):
    run = small.without_tower(small.recipe('stage2', arrays))
    with pytest.raises(UserError, match=r'model.time.patches is 0, and there is no tower to take it from'):
        init_params.complete(small.change(run, 'model', time=config.TimeConfig()), Dataset.open(arrays))
    with pytest.raises(UserError, match=r'model.time.frames is 0, it must be at least 1'):
        loop.check(small.change(run, 'model', time=config.TimeConfig(frames=0)))
    with pytest.raises(UserError, match=r'--model.time.patches is 9, .* needs 5'):
        init_params.complete(small.change(recipe(arrays), 'model', time=config.TimeConfig(2, 9)), Dataset.open(arrays))
