"""What files of images show, as the pixels and latents that are trained on; and half-precision autoencoders."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_pipelines  # noqa: E402
from dfmath.integrations.diffusers import decoded, encoded, latents_of_folder  # noqa: E402
from diffusers.utils import load_image  # noqa: E402
from PIL import Image  # noqa: E402

PLAIN = SimpleNamespace()  # no autoencoder: latents are pixels in [-1, 1]
RAMP = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369  # 0 to 65535


def pixels_of(folder, size=4):
    """(n, size, size, 3) in [0, 1], as they are shown."""
    found = 0.5 * (latents_of_folder(PLAIN, folder, size=size).latents + 1.0)
    return found.permute(0, 2, 3, 1).numpy()


def coloured(shape=(4, 4, 3)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


# Files


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(4, 4, 3), (4, 8, 3)], ids=["square", "wide"])
def test_photographs_are_shown_upright(tmp_path, orientation, shape):
    """As diffusers loads them; the central square is that of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    coloured(shape).save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(load_image(str(tmp_path / "a.png")), dtype=np.float32) / 255.0
    top, left = ((n - 4) // 2 for n in upright.shape[:2])
    np.testing.assert_allclose(pixels_of(tmp_path)[0], upright[top : top + 4, left : left + 4], atol=1e-6)


@pytest.mark.parametrize("mode", [None, "I"])
def test_grey_of_16_bits(tmp_path, monkeypatch, mode):
    """All levels are kept, in the mode of this Pillow or of older ones."""
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    reading = Image.open
    if mode is not None:
        monkeypatch.setattr(Image, "open", lambda file: reading(file).convert(mode))
    wanted = np.repeat(RAMP[..., None] / 65535.0, 3, axis=2)
    np.testing.assert_allclose(pixels_of(tmp_path)[0], wanted, atol=1e-6)
    for size in (3, 7):  # Lanczos' overshoot is cut off, as for 8 bits
        assert 0.0 <= pixels_of(tmp_path, size).min() <= pixels_of(tmp_path, size).max() <= 1.0


def test_transparent_grey_of_16_bits(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png", transparency=0)
    found = pixels_of(tmp_path)[0]
    assert found[0, 0].tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_allclose(found[0, 1:, 0], RAMP[0, 1:] / 65535.0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_lie_on_white(tmp_path, mode):
    """Fully, halfway and not at all transparent, with a hidden colour below."""
    hidden = coloured().convert(mode)
    cover = np.full((4, 4), 255, dtype=np.uint8)
    cover[0], cover[1] = 0, 51
    hidden.putalpha(Image.fromarray(cover))
    hidden.save(tmp_path / "a.png")
    below = np.asarray(hidden.convert("RGB")) / 255.0
    share = cover[..., None] / 255.0
    np.testing.assert_allclose(pixels_of(tmp_path)[0], share * below + (1.0 - share), atol=1.0 / 255.0)
    assert (pixels_of(tmp_path)[0, 0] == 1.0).all()


@pytest.mark.parametrize(("mode", "clear"), [("P", 3), ("L", 3), ("1", 0), ("RGB", (3, 3, 3))])
def test_transparent_colours_lie_on_white(tmp_path, mode, clear):
    """One colour, or place in the palette, that the file declares transparent."""
    image = Image.new(mode, (4, 4), clear)
    if mode == "P":
        image.putpalette([50] * 3 * 8)  # without its own, the place would be another in the file
    image.save(tmp_path / "a.png", transparency=clear)
    assert (pixels_of(tmp_path) == 1.0).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_opaque_pixels_are_as_they_were(tmp_path, mode):
    coloured().convert(mode).save(tmp_path / "a.png")
    wanted = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), dtype=np.float32) / 255.0
    np.testing.assert_array_equal(pixels_of(tmp_path)[0], 0.5 * ((2.0 * wanted - 1.0) + 1.0))


def test_captions_lose_the_mark_of_their_encoding(tmp_path):
    for name, encoding in (("a", "utf-8-sig"), ("b", "utf-8")):
        coloured().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("ein roter Käfer\n", encoding=encoding)
    assert latents_of_folder(PLAIN, tmp_path, size=4).captions == ("ein roter Käfer",) * 2


def test_what_is_no_folder_of_images(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold images .*, got none in"):
        latents_of_folder(PLAIN, tmp_path, size=4)
    with pytest.raises(ValueError, match=r"got '.*nowhere', which does not exist"):
        latents_of_folder(PLAIN, tmp_path / "nowhere", size=4)
    coloured().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"got '.*a\.png', which is no folder"):
        latents_of_folder(PLAIN, tmp_path / "a.png", size=4)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:11] + b"\0" + whole[12:])  # the length of its header
    with pytest.raises(ValueError, match=r"cannot be read, a\.png"):
        latents_of_folder(PLAIN, tmp_path, size=4)


# Autoencoders of half precision


def halves(dtype=torch.float16, **options):
    """A pipeline with an autoencoder of half precision, and one with the same weights in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        low = tiny_pipelines.vae(**options).eval().to(dtype)
    return SimpleNamespace(vae=low), SimpleNamespace(vae=copy.deepcopy(low).float())


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}], ids=["", "scaled"])
def test_autoencoders_that_overflow_decode_in_float32(options):
    """Where the config asks for it, as pipelines do: values and gradients; the autoencoder stays as it was."""
    pipe, wide = halves(force_upcast=True, **options)
    before = {name: (part, part.clone()) for name, part in pipe.vae.state_dict(keep_vars=True).items()}
    latents = [normal(2, 4, 8, 8).requires_grad_() for _ in range(2)]
    found, wanted = decoded(pipe, latents[0]), decoded(wide, latents[1])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    for images in (found, wanted):
        images.square().sum().backward()
    torch.testing.assert_close(latents[0].grad, latents[1].grad, rtol=1e-5, atol=1e-6)
    for name, part in pipe.vae.state_dict(keep_vars=True).items():
        assert part is before[name][0] and part.dtype == torch.float16 and torch.equal(part, before[name][1])
    assert not pipe.vae.training
    short = latents[0].detach().half()
    assert decoded(pipe, short).dtype == torch.float16
    torch.testing.assert_close(decoded(pipe, short), decoded(wide, short.float()).half(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [None, 3])
def test_autoencoders_that_overflow_encode_in_float32(dtype, seed):
    pipe, wide = halves(dtype, force_upcast=True)
    images = normal(2, 3, 16, 16).sigmoid()
    torch.testing.assert_close(encoded(pipe, images, seed), encoded(wide, images, seed), rtol=1e-6, atol=1e-6)
    assert pipe.vae.dtype == dtype


def test_checkpoints_of_gradients_stay_as_they_were():
    """A part that is computed again for its gradient would meet weights of half precision."""
    pipe, wide = halves(force_upcast=True)
    for part in (pipe, wide):
        part.vae.enable_gradient_checkpointing()
    latents = [normal(1, 4, 8, 8).requires_grad_() for _ in range(2)]
    for part, x in zip((pipe, wide), latents, strict=True):
        decoded(part, x).square().sum().backward()
    torch.testing.assert_close(latents[0].grad, latents[1].grad, rtol=1e-5, atol=1e-6)
    assert pipe.vae.is_gradient_checkpointing


def test_large_activations_do_not_overflow():
    """Beyond what float16 holds, where the autoencoder alone returns NaN."""
    pipe, _ = halves(force_upcast=True)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(5e4)
    wide = SimpleNamespace(vae=copy.deepcopy(pipe.vae).float())
    latents = normal(1, 4, 8, 8)
    assert not torch.isfinite(pipe.vae.decode(latents.half() / pipe.vae.config.scaling_factor).sample).all()
    torch.testing.assert_close(decoded(pipe, latents), decoded(wide, latents), rtol=1e-5, atol=1e-5)


def test_other_autoencoders_keep_their_dtype():
    """Those made for half precision, and decoders of bfloat16, whose range is that of float32."""
    latents, images = normal(2, 4, 8, 8), normal(2, 3, 16, 16).sigmoid()
    for dtype, upcast in ((torch.float16, False), (torch.bfloat16, True)):
        pipe, _ = halves(dtype, force_upcast=upcast)
        raw = (latents / pipe.vae.config.scaling_factor).to(dtype)
        wanted = 0.5 * (pipe.vae.decode(raw).sample.float() + 1.0)
        torch.testing.assert_close(decoded(pipe, latents), wanted, rtol=1e-6, atol=1e-6)
    pipe, _ = halves(force_upcast=False)
    wanted = pipe.vae.encode((2.0 * images - 1.0).half()).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encoded(pipe, images), wanted.float(), rtol=2e-3, atol=1e-4)
