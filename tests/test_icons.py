"""The data sets of icons, from archives of three sets that are made here: no npm, no network."""

import io
import itertools
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.datasets.icons import archives, canvas, choose, make, moving, names, tower
from experiments.datasets.icons.choose import Choice
from experiments.datasets.icons.draw import draw, inked, on_white
from qformer_jax import presets, recipes
from qformer_jax.data.jsonl import folder
from qformer_jax.errors import UserError

SETS = ('noto', 'openmoji', 'twemoji')
CONCEPTS = [f'thing-{letter}' for letter in 'abcdefghij']


def svg_body(number: int, vendor: int) -> str:
    """Return a rectangle that says which concept it is by its form, and which vendor drew it by its colour."""
    colour = ('#d00', '#0a0', '#00d')[vendor]
    return f'<rect x="2" y="3" width="{12 + number}" height="{20 - number}" fill="{colour}"/>'


def write_archive(folder: Path, name: str, found: dict, info: dict) -> None:
    """Write a set as `npm pack` leaves it."""
    with tarfile.open(archives.archive(name, folder), 'w:gz') as tar:
        for part, tree in ('icons', found), ('info', info):
            data = json.dumps(tree).encode()
            member = tarfile.TarInfo(f'package/{part}.json')
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope='module')
def choice(tmp_path_factory) -> Choice:
    """Three sets that draw ten concepts, each in its own way of naming, and something of their own."""
    folder = tmp_path_factory.mktemp('archives')
    spelt = {
        'noto': lambda concept: concept,
        'openmoji': lambda concept: concept.replace('-', ''),
        'twemoji': lambda concept: concept,
    }
    for vendor, name in enumerate(SETS):
        icons = {spelt[name](concept): {'body': svg_body(number, vendor)} for number, concept in enumerate(CONCEPTS)}
        icons |= {f'only-{name}': {'body': svg_body(0, vendor)}, 'gone': {'body': svg_body(0, vendor), 'hidden': True}}
        if name == 'noto':
            icons['thing-a-dark-skin-tone'] = {'body': svg_body(1, vendor)}
        found = {'prefix': name, 'width': 32, 'height': 24, 'icons': icons}
        write_archive(folder, name, found, {'license': {'spdx': 'MIT'}})
    return Choice(archives=folder, sets=SETS, least=3, concepts=3, validation=2)


@pytest.mark.parametrize(
    'name, beside, concept, style',
    [
        ('admission-tickets', (), 'admission-tickets', ''),
        ('waving-hand-medium-dark-skin-tone', (), 'waving-hand', 'medium-dark-skin-tone'),
        ('woman-and-man-holding-hands-dark-skin-tone-light-skin-tone', (), 'woman-and-man-holding-hands',
         'dark-skin-tone light-skin-tone'),
        ('person-kneeling-medium-skin-tone-facing-right', (), 'person-kneeling-facing-right', 'medium-skin-tone'),
        ('medium-light-skin-tone', (), 'medium-light-skin-tone', ''),
        ('boy-light', ('boy', 'boy-medium-light'), 'boy', 'light'),
        ('police-car-light', ('police-car',), 'police-car-light', ''),
        ('vertical-traffic-light', (), 'vertical-traffic-light', ''),
        ('astronaut-2', ('astronaut-1',), 'astronaut', '2'),
        ('hal-9000', (), 'hal-9000', ''),
        ('keycap-7', ('keycap-8',), 'keycap-7', ''),
        ('phone-24-filled', ('phone-24-regular', 'phone-20-regular', 'phone-20-filled'), 'phone', 'filled 24'),
        ('acorn-thin', ('acorn', 'acorn-bold', 'acorn-light'), 'acorn', 'thin'),
        ('acorn-light', ('acorn', 'acorn-bold'), 'acorn', 'light'),
        ('account-outline', ('account',), 'account', 'outline'),
        ('window-sharp', (), 'window-sharp', ''),
        ('add--filled', ('add',), 'add', 'filled'),
    ],
)  # fmt: skip
def test_a_name_is_a_concept_and_a_style(name, beside, concept, style):
    assert names.normalise({name, *beside})[name] == names.Name(concept, style)


def test_names_of_one_concept_meet():
    spelt = {'a': ('alarm-clock', 'bear-face', 'x'), 'b': ('alarmclock', 'bear'), 'c': ('alarm-clock', 'bear', 'y')}
    named = {key: names.normalise(listed) for key, listed in spelt.items()}
    own = names.same(named, {'a': {'bear-tone1': 'bear-face'}, 'b': {'bear-face': 'bear'}, 'c': {}})
    assert own == {name: name for name in ('alarm-clock', 'bear', 'x', 'y')} | {
        'alarmclock': 'alarm-clock',
        'bear-face': 'bear',
    }


def test_splits_share_neither_concept_nor_vendor(choice, capsys):
    splits = choose.icons(choice)
    assert 'noto 1.2.9: 12 icons, MIT' in capsys.readouterr().out, 'the withdrawn icon is left out'
    shown = {split: {icon.concept for icon in found} for split, found in splits.items()}
    held_out, everything = shown['concepts'], {concept.replace('-', ' ') for concept in CONCEPTS}
    assert len(held_out) == 3
    assert shown['train'] | held_out == everything and not shown['train'] & held_out
    assert shown['vendor'] == shown['train']
    for split in ('train', 'validation', 'concepts'):
        assert {icon.vendor for icon in splits[split]} <= {'noto', 'openmoji'}
    assert {icon.vendor for icon in splits['vendor']} == {'twemoji'}
    assert len(shown['validation']) == len(splits['validation']) == 2 and shown['validation'] <= shown['train']
    assert not set(splits['validation']) & set(splits['train'])
    assert [len(splits[split]) for split in ('train', 'vendor', 'concepts')] == [2 * 7 - 2, 7, 2 * 3]
    assert all(icon.name != 'thing-a-dark-skin-tone' for found in splits.values() for icon in found), 'the plain one'


def test_what_is_held_out_depends_on_the_seed_alone(choice):
    def held_out(**changes):
        splits = choose.icons(Choice(**vars(choice) | changes))
        return {icon.concept for icon in splits['concepts']}

    assert held_out() == held_out() == held_out(validation=1)
    assert held_out() != held_out(seed=1)


def test_what_cannot_be_is_said(choice, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no icon set 'notto' \(nearest: 'noto'\)"):
        archives.archive('notto', tmp_path)
    with pytest.raises(UserError, match=r"'twemojis' is none of the sets \(nearest: 'twemoji'\)"):
        choose.icons(Choice(**vars(choice) | {'vendor': 'twemojis'}))
    with pytest.raises(UserError, match='10 concepts are drawn often enough: too few for --concepts 9'):
        choose.icons(Choice(**vars(choice) | {'concepts': 9}))
    with pytest.raises(UserError, match='--least'):
        choose.icons(Choice(**vars(choice) | {'least': 4}))
    monkeypatch.setenv('PATH', '')
    with pytest.raises(UserError, match=r'no npm here; .* npm pack .* @iconify-json/noto@'):
        archives.fetch(['noto'], tmp_path)
    archives.archive('noto', tmp_path).write_bytes(b'half')
    with pytest.raises(UserError, match='not an archive of an icon set'):
        archives.read('noto', tmp_path)


def test_an_icon_lies_in_the_middle_of_a_square(choice):
    icon = archives.read('noto', choice.archives).icons['thing-a']  # 12 x 20 at (2, 3) of 32 x 24, in a square of 32
    assert inked(draw(icon, 64)) == (4, 14, 28, 54)
    assert on_white(draw(icon, 64)).getpixel((0, 0)) == (255, 255, 255)
    assert on_white(draw(icon, 64)).getpixel((8, 30)) == (221, 0, 0)


def test_pictures_are_read_back_and_the_same_again(choice, tmp_path, capsys):
    marks = [make.make(make.Options(tmp_path / name, choice, size=24)) for name in ('a', 'b')]
    assert marks[0] == marks[1]
    assert f'fingerprint {marks[0]}\nnext: qformer data pack folder' in capsys.readouterr().out
    records = {split: list(found) for split, found in folder(tmp_path / 'a').items()}
    assert {split: len(found) for split, found in records.items()} == {
        'train': 12, 'validation': 2, 'vendor': 7, 'concepts': 6,
    }  # fmt: skip
    first = records['vendor'][0]
    assert (first.image_id, first.captions) == (f'twemoji/{first.captions[0].replace(" ", "-")}.png', first.captions)
    assert Image.open(io.BytesIO(first.image)).size == (24, 24)
    with pytest.raises(UserError, match='is not empty'):
        make.make(make.Options(tmp_path / 'a', choice))


def test_boxes_are_tight_around_their_icons(choice):
    planned = canvas.plan(choose.icons(choice), seed=0, train=40)
    assert [len(found) for found in planned.values()] == [40, 4, 4, 4]
    numbers = set()
    for each in planned['train']:
        picture, placed = canvas.paint(each, 80, (0.2, 0.4))
        again, _ = canvas.paint(each, 80, (0.2, 0.4))
        assert picture.tobytes() == again.tobytes()
        pixels, free = np.asarray(picture).astype(int), np.ones((80, 80), bool)
        for icon, (left, top, right, bottom) in placed:
            assert 0 <= left < right <= 80 and 0 <= top < bottom <= 80
            assert free[top:bottom, left:right].all(), 'no two boxes overlap'
            free[top:bottom, left:right] = False
            colour = {'noto': (221, 0, 0), 'openmoji': (0, 170, 0)}[icon.vendor]
            inside = np.abs(pixels[top:bottom, left:right] - colour).sum(axis=2)
            assert np.median(inside) < 30, 'the box is full of its icon'
        assert pixels[free].min() >= 160, 'nothing is drawn beside the boxes'
        assert [box for _, box in placed] == sorted(box for _, box in placed)
        assert len({icon.concept for icon, _ in placed}) == len(placed)
        numbers.add(len(placed))
    assert numbers == {1, 2, 3, 4}


def test_canvases_are_read_back_with_phrases(choice, tmp_path):
    canvas.make(canvas.Options(tmp_path / 'set', choice, size=40, train=6))
    records = list(folder(tmp_path / 'set')['train'])
    several = next(record for record in records if len(record.phrases) > 1)
    said = [phrase for phrase, _ in several.phrases]
    assert several.captions == (f'{", ".join(said[:-1])} and {said[-1]}',)
    assert all(edge * 40 == pytest.approx(round(edge * 40)) for _, box in several.phrases for edge in box)


def test_concepts_and_sizes_can_be_chosen(choice):
    only = tuple(concept.replace('-', ' ') for concept in CONCEPTS[:3])
    found = choose.icons(replace(choice, only=only, concepts=0, validation=2))
    assert {icon.concept for icon in found['train']} == set(only) and not found['concepts']
    planned = canvas.plan({'train': found['train']}, seed=0, train=10)['train']
    boxes = [box for each in planned for _, box in canvas.paint(each, 80, (0.5, 0.55))[1]]
    assert len(boxes) > 10 and all(18 < max(right - left, bottom - top) <= 44 for left, top, right, bottom in boxes)


def test_no_frame_tells_the_direction():
    """Over all begins, an icon is everywhere exactly once, in each frame of each direction."""
    everywhere = [(left, top) for left in range(12) for top in range(12)]
    for direction in moving.DIRECTIONS:
        walks = [moving.places(begin, direction, frames=4, step=3, size=12) for begin in everywhere]
        for frame in zip(*walks, strict=True):
            assert sorted(frame) == everywhere


def test_a_video_moves_as_it_says(choice):
    planned = moving.plan(choose.icons(choice), seed=0, train=100, size=40)
    assert [len(found) for found in planned.values()] == [48, 8, 28, 24], 'four videos an icon'
    assert len({video.begin for video in planned['train'][:4]}) == 4, 'each begins elsewhere'
    for video in planned['train'][:8]:
        frames = [np.asarray(frame) for frame in moving.paint(video, frames=3, step=5, size=40)]
        assert (frames[0] != 255).any()
        for before, after in itertools.pairwise(frames):
            right, down = {'left': (-5, 0), 'right': (5, 0), 'up': (0, -5), 'down': (0, 5)}[video.direction]
            np.testing.assert_array_equal(np.roll(before, (down, right), axis=(0, 1)), after)


def test_videos_are_read_back_as_frames(choice, tmp_path):
    moving.make(moving.Options(tmp_path / 'set', choice, size=20, frames=3, train=2))
    records = list(folder(tmp_path / 'set')['train'])
    assert [record.answers for record in records] == [((way,),) for way in ('left', 'right', 'up', 'down')] * 2
    assert {len(record.frames) for record in records} == {3}
    assert records[0].captions[0].endswith(' moves left') and records[0].questions == (moving.QUESTION,)


@pytest.mark.parametrize(
    'drawn, options, said',
    [
        (make, {'size': 0}, r'0 x 0 pixels shows nothing.*--size'),
        (canvas, {'size': 7}, r'1 x 1 pixels shows nothing.*--size'),
        (canvas, {'icons': (0.4, 0.2)}, r'--icons 0\.4 0\.2 are not.*--size 224'),
        (canvas, {'icons': (0.5, 1.5)}, r'--icons 0\.5 1\.5 are not'),
        (canvas, {'size': 7, 'icons': (0.2, 0.25)}, r'a pixel apart'),
        (moving, {'step': 32}, r'--step 32 --size 64: .*less than half of the size'),
        (moving, {'frames': 1}, r'--frames 1 .*two frames'),
    ],
)
def test_what_cannot_be_drawn_is_said(choice, tmp_path, drawn, options, said):
    with pytest.raises(UserError, match=said):
        drawn.make(drawn.Options(tmp_path / 'set', choice, **options))
    assert not list(tmp_path.glob('set*')), 'and nothing is left of it'


def test_the_tower_is_its_own_recipe():
    run, card = recipes.load(tower.__file__)
    assert run == tower.config() and card.startswith('The frozen tower')
    assert run.model.vit.depth < presets.DINOV2_S.depth and not run.model.vit.final_norm
