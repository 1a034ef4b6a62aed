"""Files and bytes of pictures: which are read, how they are turned, and what is said of the others."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from data_sets import write_lines
from PIL import Image, features

from qformer_jax.data import jsonl, pictures
from qformer_jax.data.transforms import eval_image, train_images
from qformer_jax.errors import UserError
from qformer_jax.export import runner
from qformer_jax.inference import inputs, locate

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def saved(pixels: np.ndarray, form: str, **options) -> bytes:
    """Return the pixels as a file of a format."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Return the pixels as an encoded PNG."""
    return saved(pixels, 'PNG')


def train_image(data, *options) -> np.ndarray:
    """Return one picture as training draws it."""
    return train_images([pictures.decode(data)], *options)[0]


@pytest.mark.parametrize('form', [form for form in pictures.FORMATS if form in Image.SAVE or not Image.init()])
def test_every_stated_format_is_read(form, tmp_path):
    if form not in Image.SAVE:
        pytest.skip(f'this Pillow was built without {form}')
    smooth = np.full((40, 60, 3), (200, 40, 40), np.uint8)
    data = saved(smooth, form)
    assert np.abs(np.asarray(pictures.decode(data)).astype(int) - smooth).max() < 8
    (file := tmp_path / 'picture').write_bytes(data)
    assert jsonl.read_picture(file) == data
    np.testing.assert_array_equal(np.asarray(runner.upright(file)), np.asarray(pictures.decode(data)))


def test_an_exported_folder_reads_the_same_formats():
    assert runner.FORMATS == pictures.FORMATS
    assert {'.jpg', '.jpeg', '.png', '.tif', '.webp'} <= pictures.suffixes()


@pytest.mark.parametrize(
    'data, kind',
    [
        (b'\0\0\0\x18ftypheic' + bytes(90), 'HEIC, which is not read'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'EPS, which is not read'),
        (b'%PDF-1.4\n', 'PDF, which is not read'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'SVG, which is not read'),
        (saved(NOISE, 'DDS'), 'DDS, which is not read'),
        (saved(NOISE, 'ICO'), 'ICO, which is not read'),
        (saved(NOISE, 'PCX'), 'not a picture, or none of a format that is read'),
        (b'', 'not a picture, or none of a format that is read'),
    ],
)
def test_a_format_that_is_not_read_is_named(data, kind, tmp_path):
    """EPS above all: Pillow would have Ghostscript run it."""
    with pytest.raises(UserError, match=rf'x\.bin: {kind}: save it as JPEG or PNG \(read are AVIF, BMP, '):
        pictures.decode(data, 'x.bin')
    (tmp_path / 'x.bin').write_bytes(data)
    with pytest.raises(runner.Refused, match=r'x\.bin: not a picture that is read \(AVIF, '):
        runner.upright(tmp_path / 'x.bin')


@pytest.mark.parametrize('error', [IndexError('list index out of range'), MemoryError(), ZeroDivisionError('x\ny')])
def test_whatever_a_decoder_raises_is_one_line(error, monkeypatch):
    def load(self):
        raise error

    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', load)
    with pytest.raises(UserError, match=r'cat\.png: damaged \([^\n]+\); replace the file') as raised:
        pictures.decode(png(NOISE), 'cat.png')
    assert '\n' not in str(raised.value)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(pictures, 'MAX_PIXELS', 40 * 60)
    pictures.decode(png(NOISE))
    monkeypatch.setattr(pictures, 'MAX_PIXELS', 40 * 60 - 1)
    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', lambda self: pytest.fail('decoded'))
    with pytest.raises(UserError, match='60 x 40 pixels, more than 2,399; shrink it'):
        pictures.decode(png(NOISE))


def special_files(folder: Path) -> dict[str, str]:
    """Make files that are no pictures; return what is said of each by its name."""
    os.mkfifo(folder / 'pipe')
    (folder / 'zero').symlink_to('/dev/zero')
    (folder / 'inside').mkdir()
    (folder / 'loop').symlink_to('loop')
    (folder / 'nowhere').symlink_to('gone')
    with (folder / 'large').open('wb') as file:
        file.truncate(pictures.MAX_BYTES + 1)
    device, absent = 'no such picture, it is a pipe or a device', 'no such picture'
    return {'pipe': device, 'zero': device, 'loop': absent, 'nowhere': absent, 'a\0b': absent, 'a' * 300: absent,
            'large': '512 MiB; a picture may have 512'}  # fmt: skip


def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path):
    for name, said in special_files(tmp_path).items():
        for read in (jsonl.read_picture, lambda file: inputs.read(file, 16)):
            with pytest.raises(UserError, match=said):
                read(tmp_path / name)
    with pytest.raises(UserError, match='no such picture, it is a folder'):
        jsonl.read_picture(tmp_path / 'inside')


def test_names_stay_below_their_folder_unless_that_is_asked_for(tmp_path):
    """By a link they may lead anywhere: who made it could have copied the file."""
    outside, source = tmp_path / 'a.png', tmp_path / 'source'
    outside.write_bytes(png(NOISE))
    (tmp_path / 'source' / 'sub').mkdir(parents=True)
    (source / 'linked.png').symlink_to(outside)
    for name in ('linked.png', 'sub/../../a.png', str(outside)):
        write_lines(source, {'file': name, 'caption': 'x'})
        if name != 'linked.png':
            with pytest.raises(UserError, match=r'line 1: .* may lie outside the folder; .* allow it by --allow-outs'):
                list(jsonl.folder(source)['train'])
        (record,) = jsonl.folder(source, allow_outside=True)['train']
        assert record.image == outside.read_bytes()
    write_lines(source, {'file': 'linked.png', 'caption': 'x'})
    assert len(list(jsonl.folder(source)['train'])) == 1


@pytest.mark.parametrize('data', [b'', b'no picture', png(NOISE)[:-900]], ids=['empty', 'text', 'truncated'])
def test_a_damaged_picture_is_a_user_error(data):
    with pytest.raises(UserError, match=r'cat\.png'):
        pictures.decode(data, 'cat.png')


UPRIGHT = np.zeros((40, 64, 3), np.uint8)
UPRIGHT[:16, :24], UPRIGHT[:16, 24:], UPRIGHT[16:, :24] = (250, 20, 20), (20, 250, 20), (20, 20, 250)
STORED = {  # EXIF's orientation -> how the picture then lies in the file
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
FORMATS = ['JPEG', 'PNG', 'TIFF', *(['WEBP'] if features.check('webp') else [])]


def turned(orientation: int, form: str, pixels: np.ndarray = UPRIGHT) -> bytes:
    """Return a file of the picture that lies as a camera may have held it, and says so."""
    image, exif, file = Image.fromarray(pixels), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    lying = image.transpose(STORED[orientation]) if STORED[orientation] is not None else image
    lying.save(file, form, exif=exif, **({'quality': 100, 'subsampling': 0} if form == 'JPEG' else {'lossless': True}))
    return file.getvalue()


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize('orientation', STORED)
def test_a_picture_is_turned_as_its_exif_says(form, orientation, tmp_path):
    """Read by all that reads pictures: training, use, and the drawing of boxes; a PIL image as its file."""
    data = turned(orientation, form)
    inside = np.s_[2:-2, 2:-2]  # JPEG's blocks mix colours at the edges
    tolerance = 12 if form == 'JPEG' else 0
    for given in (data, Image.open(io.BytesIO(data))):
        got = np.asarray(pictures.decode(given)).astype(int)
        assert got.shape == UPRIGHT.shape and np.abs(got - UPRIGHT)[inside].mean() <= tolerance / 4
    wanted = eval_image(png(UPRIGHT), 32).astype(int)
    (file := tmp_path / 'a').write_bytes(data)
    ways = [eval_image(data, 32), inputs.read(file, 32), inputs.read([data], 32)[0]]
    ways.append(train_image(data, 32, (1.0, 1.0), False, np.random.default_rng(0)))
    for way in ways:
        assert np.abs(way - wanted).max() <= 4 * tolerance
    locate.draw(file, {}, tmp_path / 'drawn.png')
    drawn = Image.open(tmp_path / 'drawn.png')
    assert drawn.size == (64 * 7, 40 * 7)
    assert np.abs(eval_image(drawn, 32) - wanted).max() <= 4 * tolerance + 24  # enlarged, and made small again


def grey_file(pixels: np.ndarray, form: str, orientation: int = 1) -> bytes:
    image, exif, file = Image.fromarray(pixels), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, form, **({'exif': exif} if orientation > 1 else {}))
    return file.getvalue()


GREY = np.zeros((16, 24), np.uint16)
GREY[:, :8], GREY[:, 8:16] = 65535, 20000


@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'PPM'])
def test_grey_of_16_bits_is_scaled(form):
    got = np.asarray(pictures.decode(grey_file(GREY, form)))
    assert got[4, [2, 10, 20]].tolist() == [[255] * 3, [78] * 3, [0] * 3]
    if form != 'PPM':
        lying = np.asarray(pictures.decode(grey_file(np.rot90(GREY), form, orientation=6)))
        np.testing.assert_array_equal(lying, got, err_msg='turned too')
    big_endian = Image.fromarray(GREY.astype('>u2'))
    np.testing.assert_array_equal(np.asarray(pictures.decode(big_endian)), got)


@pytest.mark.parametrize('dtype, kind', [(np.int32, '32-bit grey'), (np.float32, 'grey of floats')])
def test_grey_without_a_known_white_is_refused(dtype, kind, tmp_path):
    (tmp_path / 'scan.tiff').write_bytes(grey_file(GREY.astype(dtype), 'TIFF'))
    for read in (lambda f: pictures.decode(f.read_bytes(), str(f)), lambda f: inputs.read(f, 16)):
        with pytest.raises(UserError, match=rf'scan\.tiff: {kind}, and nothing says which value is white'):
            read(tmp_path / 'scan.tiff')
    with pytest.raises(UserError, match=kind):
        pictures.decode(Image.fromarray(GREY.astype(dtype)))


def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is_stored():
    image, file = Image.fromarray(UPRIGHT), io.BytesIO()
    image.save(file, 'PNG', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12')
    np.testing.assert_array_equal(np.asarray(pictures.decode(file.getvalue())), UPRIGHT)
