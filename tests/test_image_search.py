"""Search over a folder: what BLIP-2 retrieves, encoded once, and anew exactly where something changed."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import small
from safetensors.numpy import load_file

from qformer_jax import cli
from qformer_jax.errors import UserError
from qformer_jax.inference import forward
from qformer_jax.inference.blip2 import Blip2
from qformer_jax.inference.image_search import Gallery, picture_files

KINDS = [(colour, shape) for shape in small.SHAPES for colour in small.COLOURS]
TEXT = 'A red square!'


@pytest.fixture(scope='module')
def aligned(line) -> Blip2:
    return Blip2.load(line / 'stage1', batch_size=8)


@pytest.fixture
def folder(tmp_path):
    """Eight pictures, two of them in a folder inside, and a text file."""
    inside = tmp_path / 'pictures' / 'more'
    inside.mkdir(parents=True)
    for number, kind in enumerate(KINDS):
        small.draw_picture(*kind).save((inside if number > 5 else inside.parent) / f'{number}.png')
    (inside / 'notes.txt').write_text('no picture')
    return inside.parent


def opened(model: Blip2, folder, **options) -> Gallery:
    return Gallery(small.keeping(model, folder.parent / 'cache'), picture_files([folder]), **options)


def test_a_search_is_itc_then_itm_over_the_best(aligned, folder):
    hits = opened(aligned, folder).search(TEXT, reranked=3)
    files = picture_files([folder])
    cosine, logit = (aligned.similarity(files, [TEXT], by=by)[:, 0] for by in ('itc', 'itm'))
    best = np.argsort(-cosine)
    again = sorted(best[:3], key=lambda i: -(cosine + logit)[i])
    assert [hit.file for hit in hits] == [files[i] for i in [*again, *best[3:]]]
    np.testing.assert_allclose([hit.cosine for hit in hits], cosine[[*again, *best[3:]]], atol=1e-5)
    np.testing.assert_allclose([hit.score for hit in hits[:3]], (cosine + logit)[again], atol=1e-5)
    assert [hit.score for hit in hits[3:]] == [None] * 5


def test_a_second_search_encodes_nothing_and_finds_the_same_bits(aligned, folder, encoded, monkeypatch):
    first = opened(aligned, folder)
    hits = first.search(TEXT)
    assert sum(encoded) == 8
    encoded.clear()
    monkeypatch.setattr(forward, 'embed_image', lambda *_: pytest.fail('embedded again'))
    second = opened(aligned, folder)
    assert second.search(TEXT) == hits
    assert second.search('a blue circle')[0].file != hits[0].file
    assert second.vectors.tobytes() == first.vectors.tobytes()
    assert encoded == []


def test_what_is_kept_is_what_would_be_computed(aligned, folder):
    """To the bit through the same batches, to 1e-5 through others."""
    files = picture_files([folder])
    opened(aligned, folder).search(TEXT)
    kept = opened(aligned, folder)
    image_features = aligned.encode_images(files)
    assert kept.features(files).features.tobytes() == image_features.features.tobytes()
    assert kept.vectors.tobytes() == aligned.features(image_features).tobytes()
    alone = dataclasses.replace(aligned, batch_size=1)
    np.testing.assert_allclose(kept.vectors, alone.features(files), atol=1e-5)
    np.testing.assert_allclose(kept.features(files).features, alone.encode_images(files).features, atol=1e-5)


def test_new_changed_and_deleted_pictures_are_noticed(aligned, folder, encoded, capsys):
    opened(aligned, folder).search(TEXT)
    (folder / '0.png').unlink()
    shutil.move(folder / '1.png', folder / 'moved.png')  # known by its content
    small.draw_picture('red', 'square').resize((40, 40)).save(folder / '2.png')
    small.draw_picture('red', 'circle').resize((50, 50)).save(folder / 'new.png')
    encoded.clear(), capsys.readouterr()
    hits = opened(aligned, folder).search(TEXT)
    assert sum(encoded) == 2 and '8 pictures, 2 of them new' in capsys.readouterr().err
    assert {hit.file.name for hit in hits} == {f'{n}.png' for n in range(2, 8)} | {'moved.png', 'new.png'}
    fresh = Gallery(small.keeping(aligned, folder.parent / 'other'), picture_files([folder])).search(TEXT)
    np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in fresh], atol=1e-5)


def test_what_an_entry_depends_on_makes_another_entry(aligned, folder, encoded):
    """Another Q-Former over the same tower reads the kept features; another tower, size or dtype does not."""
    first = picture_files([folder])[:1]
    opened(aligned, folder).features(first)

    def encodes(model: Blip2) -> int:
        encoded.clear()
        opened(model, folder).features(first)
        return sum(encoded)

    def with_params(part: str) -> Blip2:
        moved = jax.tree.map(lambda x: x * 1.1, aligned.params[part])
        return dataclasses.replace(aligned, params=aligned.params | {part: moved})

    assert encodes(aligned) == 0
    assert encodes(with_params('qformer')) == 0
    assert encodes(with_params('vit')) == 1
    assert encodes(aligned.quantize('int8')) == 1
    assert encodes(aligned.quantize('int8')) == 0
    run = small.change(aligned.run, 'training', dtype='bfloat16')
    assert encodes(dataclasses.replace(aligned, run=run)) == 1
    vit = dataclasses.replace(aligned.run.model.vit, norm_eps=1e-5)
    assert encodes(dataclasses.replace(aligned, run=small.change(aligned.run, 'model', vit=vit))) == 1


def test_another_qformer_has_vectors_of_its_own(aligned, folder):
    first = opened(aligned, folder).vectors
    moved = jax.tree.map(lambda x: x * 1.1, aligned.params['qformer'])
    other = dataclasses.replace(aligned, params=aligned.params | {'qformer': moved})
    assert np.abs(opened(other, folder).vectors - first).max() > 1e-3


def test_damage_is_computed_again_aloud(aligned, folder, encoded, capsys):
    hits = opened(aligned, folder).search(TEXT)
    for file in (folder.parent / 'cache').iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:600] + bytes(400) + content[1000:])
    encoded.clear(), capsys.readouterr()
    assert opened(aligned, folder).search(TEXT) == hits
    assert sum(encoded) == 8 and capsys.readouterr().err.count('damaged') == 2


def test_without_itm_no_features_are_kept(aligned, folder):
    hits = opened(aligned, folder, keep_features=False).search(TEXT, reranked=0)
    assert [hit.score for hit in hits] == [None] * 8
    cosines = [hit.cosine for hit in hits]
    assert cosines == sorted(cosines, reverse=True)
    assert len(list((folder.parent / 'cache').iterdir())) == 1


def test_the_command_searches(line, folder, capsys):
    capsys.readouterr()
    cli.run(['search', str(line / 'stage1'), str(folder), TEXT, '--top', '3', '--rerank', '4'])
    out, err = capsys.readouterr()
    hits = Gallery(Blip2.load(line / 'stage1', cache=line / 'cache'), picture_files([folder])).search(TEXT, 4)
    found = ''.join(row.split('│')[2].strip() for row in out.splitlines() if row.count('│') == 5)  # names are folded
    assert found == ''.join(str(hit.file) for hit in hits[:3])
    assert f'{hits[0].score:.4f}' in out and f'{hits[2].cosine:.4f}' in out
    assert 'left out: 1 file(s)' in err and '8 pictures, 8 of them new' in err


def test_the_command_embeds_files_folders_and_texts(line, aligned, folder, tmp_path, capsys):
    files = [folder / '3.png', *picture_files([folder / 'more'])]
    words = ['embed', line / 'stage1', folder / '3.png', folder / 'more', '--texts', TEXT, 'a cat']
    cli.run([*map(str, words), '--out', str(tmp_path / 'mine.safetensors')])
    tensors = load_file(tmp_path / 'mine.safetensors')
    np.testing.assert_allclose(tensors['pictures'], aligned.features(files), atol=1e-5)
    np.testing.assert_allclose(tensors['texts'], aligned.features(texts=[TEXT, 'a cat'], mode='text'), atol=1e-5)
    names = json.loads((tmp_path / 'mine.json').read_text())
    assert names == {'pictures': list(map(str, files)), 'texts': [TEXT, 'a cat']}
    assert f'wrote {tmp_path / "mine.safetensors"}: pictures [3, 4, 8], texts [2, 8]' in capsys.readouterr().out


@pytest.mark.parametrize(
    'words, complaint',
    [
        (['search', 'stage1', 'nowhere', TEXT], 'nowhere: no such file or folder'),
        (['search', 'instruct', '.', TEXT], "'instruct' run: its queries have left the space"),
        (['embed', 'stage1'], 'nothing to embed'),
        (['embed', 'stage1', '.', '--out', 'x.npz'], 'name it .safetensors'),
    ],
)
def test_wrong_input_is_one_line(line, words, complaint):
    with pytest.raises(UserError, match=complaint):
        cli.run([words[0], str(line / words[1]), *words[2:]])


def test_an_empty_folder_and_a_damaged_picture_are_named(aligned, tmp_path):
    with pytest.raises(UserError, match='no picture in'):
        picture_files([tmp_path])
    (tmp_path / 'bad.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match=r'bad\.png: not a picture'):
        Gallery(small.keeping(aligned, tmp_path / 'cache'), picture_files([tmp_path])).search(TEXT)


def test_a_model_without_heads_is_refused(aligned, folder):
    qformer = dataclasses.replace(aligned.run.model.qformer, text_side='reads')
    model = dataclasses.replace(aligned, run=small.change(aligned.run, 'model', qformer=qformer))
    with pytest.raises(UserError, match=r"no heads of ITC and ITM \(its text side is 'reads'\)"):
        model.similarity(picture_files([folder])[:1], [TEXT])


def test_pictures_behind_links_to_folders_are_found_once(tmp_path):
    (tmp_path / 'elsewhere' / 'inside').mkdir(parents=True)
    (tmp_path / 'searched').mkdir()
    for folder in ('elsewhere', 'elsewhere/inside'):
        small.draw_picture('red', 'square').save(tmp_path / folder / 'a.png')
    (tmp_path / 'searched' / 'linked').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere' / 'back').symlink_to(tmp_path / 'searched')
    (tmp_path / 'elsewhere' / 'again').symlink_to(tmp_path / 'elsewhere' / 'inside')
    found = picture_files([tmp_path / 'searched'])
    assert sorted({file.resolve() for file in found}) == sorted(file.resolve() for file in found) and len(found) == 2
