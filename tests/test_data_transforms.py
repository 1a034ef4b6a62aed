"""Pictures to arrays: LAVIS's recorded crops, torchvision's crop rule, and damaged files."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from qformer_jax.data import transforms
from qformer_jax.data.transforms import decode, eval_image, random_box, train_images
from qformer_jax.errors import UserError
from qformer_jax.inference import inputs, locate
from qformer_jax.models.vit import normalise

with np.load(Path(__file__).parent / 'goldens' / 'lavis' / 'processors' / 'arrays.npz') as _file:
    GOLDEN = dict(_file)


def png(pixels: np.ndarray) -> bytes:
    """Return the pixels as an encoded PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def train_image(data, *options) -> np.ndarray:
    """Return one picture as training draws it."""
    return train_images([decode(data)], *options)[0]


NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.mark.parametrize('case', range(4))
def test_training_transform_equals_lavis(case, monkeypatch):
    top, left, height, width = map(int, GOLDEN['train28.crop'][case])
    monkeypatch.setattr(transforms, 'random_box', lambda *_: (left, top, left + width, top + height))
    image = transforms.decode(png(GOLDEN['gradient_rgb_100x60.raw']))
    rng = np.random.default_rng(next(s for s in range(99) if flips(s) == GOLDEN['train28.flip'][case]))
    got = train_image(image, 28, (0.5, 1.0), True, rng)
    normal = np.asarray(normalise(got[None].copy()))[0]
    np.testing.assert_allclose(normal.transpose(2, 0, 1), GOLDEN['train28.out'][case], atol=1e-5)


def flips(seed: int) -> bool:
    """Whether this seed's first draw mirrors."""
    return np.random.default_rng(seed).random() < 0.5


@pytest.mark.parametrize('size', [(64, 64), (200, 50), (30, 90)])
def test_crops_lie_inside_and_have_the_asked_area_and_ratio(size):
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = random_box(*size, (0.5, 1.0), rng)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        w, h = right - left, bottom - top
        assert 0.7 < w / h < 1.4
        if size == (64, 64):
            assert 0.48 < w * h / 64**2 <= 1


def test_a_long_strip_falls_back_to_its_centre():
    assert random_box(600, 30, (0.9, 1.0), np.random.default_rng(0)) == (280, 0, 320, 30)
    assert random_box(30, 600, (0.9, 1.0), np.random.default_rng(0)) == (0, 280, 30, 320)


def test_full_scale_means_no_crop():
    got = train_image(png(NOISE), 32, (1.0, 1.0), False, np.random.default_rng(0))
    np.testing.assert_array_equal(got, eval_image(png(NOISE), 32))


def test_half_of_the_pictures_are_mirrored():
    rng, plain = np.random.default_rng(0), eval_image(png(NOISE), 32)
    kept = [np.array_equal(train_image(png(NOISE), 32, (1.0, 1.0), True, rng), plain) for _ in range(200)]
    assert 70 < sum(kept) < 130
    assert np.array_equal(eval_image(png(NOISE), 32)[:, ::-1], plain[:, ::-1])


def test_every_mode_becomes_rgb():
    grey = Image.fromarray(NOISE[..., 0])
    for image in (grey, grey.convert('LA'), Image.fromarray(NOISE).convert('CMYK'), Image.fromarray(NOISE).quantize(9)):
        assert eval_image(image, 16).shape == (16, 16, 3)


def test_transparency_of_a_palette_keeps_the_colours():
    palette = Image.fromarray(NOISE).quantize(9)
    file = io.BytesIO()
    palette.save(file, 'PNG', transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(eval_image(file.getvalue(), 60), eval_image(palette.convert('RGB'), 60))


@pytest.mark.parametrize('data', [b'', b'no picture', png(NOISE)[:-900]], ids=['empty', 'text', 'truncated'])
def test_a_damaged_picture_is_a_user_error(data):
    with pytest.raises(UserError, match=r'cat\.png'):
        transforms.decode(data, 'cat.png')


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
        got = np.asarray(transforms.decode(given)).astype(int)
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
    got = np.asarray(transforms.decode(grey_file(GREY, form)))
    assert got[4, [2, 10, 20]].tolist() == [[255] * 3, [78] * 3, [0] * 3]
    if form != 'PPM':
        lying = np.asarray(transforms.decode(grey_file(np.rot90(GREY), form, orientation=6)))
        np.testing.assert_array_equal(lying, got, err_msg='turned too')
    big_endian = Image.fromarray(GREY.astype('>u2'))
    np.testing.assert_array_equal(np.asarray(transforms.decode(big_endian)), got)


@pytest.mark.parametrize('dtype, kind', [(np.int32, '32-bit grey'), (np.float32, 'grey of floats')])
def test_grey_without_a_known_white_is_refused(dtype, kind, tmp_path):
    (tmp_path / 'scan.tiff').write_bytes(grey_file(GREY.astype(dtype), 'TIFF'))
    for read in (lambda f: transforms.decode(f.read_bytes(), str(f)), lambda f: inputs.read(f, 16)):
        with pytest.raises(UserError, match=rf'scan\.tiff: {kind}, and nothing says which value is white'):
            read(tmp_path / 'scan.tiff')
    with pytest.raises(UserError, match=kind):
        transforms.decode(Image.fromarray(GREY.astype(dtype)))


def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is_stored():
    image, file = Image.fromarray(UPRIGHT), io.BytesIO()
    image.save(file, 'PNG', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12')
    np.testing.assert_array_equal(np.asarray(transforms.decode(file.getvalue())), UPRIGHT)
