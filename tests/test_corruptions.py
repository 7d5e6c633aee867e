"""Claims about tools/corruptions.py. Each docstring ends with the change under which its test failed."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import io
from torchvision.transforms.v2 import functional as v2

import common
from common import InputError
from tools import streams
from tools.corruptions import (
    CORRUPTIONS, HELD_OUT, OWN, SEVERITIES, corrupt, corrupted, gaussian_blur, image_streams,
    motion_blur, shuffle_locally, zoom)

# torchvision 0.29 recommends TorchCodec
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")
ALL = CORRUPTIONS + HELD_OUT
NOISE = [c for c in ALL if c.endswith("noise")]
RANDOM = [*NOISE, "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform", "spatter"]
SMALL = common.load_data("fashion").test.tensors[0][:64]  # (64, 3, 32, 32)
COLOUR = torch.randint(0, 256, (4, 3, 28, 28), generator=torch.Generator().manual_seed(0)).float()
LARGE = F.interpolate(COLOUR, size=224, mode="bicubic").clamp(0, 255).to(torch.uint8)  # smooth, coloured
GREY = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)


def run(x, corruption, severity, seed=0, first=0):
    return corrupt(x, corruption, severity, torch.arange(first, first + len(x)), seed)


def in_floats(x, corruption, severity):
    each = image_streams(torch.arange(len(x)), x.device, corruption, severity, 0)
    return corrupted(x.float() / 255, corruption, severity, each)


# ----- every corruption ------------------------------------------------------------------------------

# The published parameters do not grow in every respect, so these need not grow at each step.
NOT_MONOTONE = {
    "glass_blur": "32 px: one round at severity 3, two at a smaller sigma at 4",
    "motion_blur": "32 px: severities 3 and 4 have the same sigma, differ in taps beyond 4 sigma only",
    "snow": "severity 3 has larger but fewer flakes than 2",
    "frost": "ice is added, but the image is dimmed, too: on grey the two cancel",
    "elastic_transform": "the affine part shrinks as the displacement grows",
    "spatter": "1 to 3 are water and 4 to 5 mud, which at 32 px begins with little",
    "saturate": "severities 1 and 2 take colour away, 3 to 5 add some; 1 to 3 do nothing to grey images",
}
# Severity 5 than 1.
NOT_EVEN_FARTHER = [
    ("elastic_transform", 32), ("elastic_transform", 224), ("frost", 224), ("saturate", 224)]


@pytest.mark.parametrize("corruption", ALL)
@pytest.mark.parametrize("x", [SMALL, LARGE], ids=["32px", "224px"])
def test_severity_is_monotone(x, corruption):
    """Mean distance from the clean image grows. Fails if severities index the table backwards."""
    d = [(run(x, corruption, s).float() - x.float()).abs().mean().item() for s in range(1, 6)]
    if corruption not in NOT_MONOTONE:
        assert d == sorted(d) and d[0] > 0 and len(set(d)) == 5, d
    elif (corruption, x.shape[-1]) not in NOT_EVEN_FARTHER:
        assert d[4] > d[0], d
    else:
        assert min(d) > 1, d


def test_every_corruption_has_five_severities_at_both_sizes():
    """15 + 4 names, no two severities alike. Fails if a row of the table lacks a value or a size."""
    assert len(CORRUPTIONS) == 15 and len(HELD_OUT) == 4 and set(ALL) == set(SEVERITIES)
    for sizes in SEVERITIES.values():
        assert len(sizes) == 2 and all(len(set(five)) == len(five) == 5 for five in sizes)


@pytest.mark.parametrize("corruption", ALL)
def test_every_corruption_makes_images_and_severity_0_is_clean(corruption):
    """Bytes of the same shape, made of floats in [0, 1], of black and white as well.

    Fails if floats are returned, if the last clamp goes, or if severity 0 is the last of the table.
    """
    for x in (SMALL[:8], LARGE[:1]):
        y, floats = run(x, corruption, 5), in_floats(x, corruption, 5)
        assert y.dtype == torch.uint8 and y.shape == x.shape
        assert floats.min() >= 0 and floats.max() <= 1 and floats.isfinite().all()
        assert torch.equal(run(x, corruption, 0), x)


@pytest.mark.parametrize("corruption", ALL)
def test_an_image_is_corrupted_alike_in_every_batch(corruption):
    """Alone, and as number 3 of 7. Fails if one generator runs through the batch."""
    for severity in (1, 3, 5):
        together = run(SMALL[:7], corruption, severity)
        alone = torch.cat([run(SMALL[i:i + 1], corruption, severity, first=i) for i in range(7)])
        assert torch.equal(together, alone)


def test_one_line_adds_a_corruption(monkeypatch):
    """Known to --corruptions, kept in range. Fails if a second place has to know its name."""
    monkeypatch.setitem(OWN, "dusk", lambda x, severity: x * 2 - severity)
    assert streams.corruption_names(["dusk", "fog"]) == ["dusk", "fog"]
    assert torch.equal(run(GREY, "dusk", 1), torch.zeros_like(GREY) + 1)
    assert (run(GREY, "dusk", 2) == 0).all()


@pytest.mark.parametrize("corruption, severity, says", [
    ("gausian_noise", 1, "names: gaussian_noise"), ("fog", -1, "severity"), ("fog", 6, "severity")])
def test_unknown_names_and_severities_are_input_errors(corruption, severity, says):
    """With the nearest names. Fails if they end in a KeyError or IndexError."""
    with pytest.raises(InputError, match=says):
        run(GREY, corruption, severity)


# ----- random numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", RANDOM)
def test_same_seed_same_image_other_seed_or_index_another(corruption):
    """Fails if the seed, or the index, is left out of the key."""
    x = SMALL[:1].expand(4, -1, -1, -1)
    y = run(x, corruption, 5)
    assert torch.equal(y, run(x, corruption, 5))
    assert all(not torch.equal(a, b) for a, b in zip(y, run(x, corruption, 5, seed=1)))
    assert not torch.equal(y[0], y[1]) and not torch.equal(y[1], y[2])


def test_random_numbers_do_not_depend_on_the_process():
    """Numbers written down once.

    Fails if the key holds Python's hash(), which differs from process to process.
    """
    each = image_streams(torch.tensor([0, 9999]), torch.device("cpu"), "fog", 3, 0)
    drawn = each(lambda i, g: torch.randint(1000, (3,), generator=g))
    assert drawn.tolist() == [[90, 724, 920], [259, 202, 394]]


def test_streams_of_images_draws_severities_and_corruptions_are_independent():
    """Correlation of 4,096 normal numbers below 5 / sqrt(n).

    Fails if the severity, or the draw's number, is not in the key.
    """
    rows = []
    for corruption, severity in (("fog", 1), ("fog", 2), ("snow", 1)):
        each = image_streams(torch.arange(30), torch.device("cpu"), corruption, severity, 0)
        rows += [each(lambda i, g: torch.randn(4096, generator=g)) for _ in range(2)]
    corr = torch.corrcoef(torch.cat(rows)) - torch.eye(180)
    assert corr.abs().max() < 5 / 64


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_has_the_standard_deviation_of_the_table(severity):
    """On mid-grey. Fails if shot noise divides by another number than it multiplied with, or if speckle
    noise is not times x."""
    p = {c: SEVERITIES[c][0][severity - 1] for c in NOISE}
    x = 128 / 255
    expected = {"gaussian_noise": p["gaussian_noise"], "speckle_noise": p["speckle_noise"] * x,
                "shot_noise": (x / p["shot_noise"]) ** 0.5}
    for c, sd in expected.items():
        assert in_floats(GREY, c, severity).std().item() == pytest.approx(sd, rel=0.02)
    y = in_floats(GREY, "impulse_noise", severity)
    for value in (0, 1):  # half of the share each, with a binomial error
        assert (y == value).float().mean().item() == pytest.approx(p["impulse_noise"] / 2, rel=0.15)


@pytest.mark.parametrize("corruption", NOISE)
def test_noise_is_drawn_for_each_channel(corruption):
    """Grey images get coloured noise. Fails if one plane of noise is shared by the channels."""
    y = in_floats(GREY, corruption, 5)
    assert np.corrcoef(y[:, 0].flatten(), y[:, 1].flatten())[0, 1] < 0.05


# ----- against other libraries -----------------------------------------------------------------------


def in_hsv(x, change):
    """change(h, s, v) of every pixel, with Python's colorsys."""
    pixels = (x.float() / 255).permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in pixels]
    return torch.tensor(pixels).view(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2)


def brightness(x, p):
    return in_hsv(x, lambda h, s, v: (h, s, min(v + p, 1)))


def saturate(x, p):
    return in_hsv(x, lambda h, s, v: (h, min(max(p[0] * s + p[1], 0), 1), v))


def contrast(x, p):
    x = x.float() / 255
    return v2.adjust_contrast(x.flatten(0, 1)[:, None], p).view_as(x)  # each channel is a grey image


def pixelate(x, p):
    size = [int(p * x.shape[-1])] * 2
    images = [v2.to_pil_image(image).resize(size, 4).resize(x.shape[2:], 4) for image in x]  # 4: a box
    return torch.stack([v2.pil_to_tensor(image) for image in images]) / 255


def jpeg_compression(x, p):
    return torch.stack([io.decode_jpeg(io.encode_jpeg(image, quality=p)) for image in x]) / 255


@pytest.mark.parametrize("x", [torch.cat([LARGE[:2, :, ::7, ::7], SMALL[:6]]), LARGE[:1]],
                         ids=["32px", "224px"])
@pytest.mark.parametrize("reference", [brightness, saturate, contrast, pixelate, jpeg_compression])
def test_what_needs_no_random_numbers_equals_another_library(reference, x):
    """With black, grey and coloured pixels; Pillow rounds twice.

    Fails if brightness is added to RGB, if grey has another hue than 0, if all channels have one mean,
    if there are round(c S) blocks a side, if 5 is added to the quality, or with the other size's table.
    """
    name = reference.__name__
    for severity in range(1, 6):
        expected = reference(x, SEVERITIES[name][x.shape[-1] >= 100][severity - 1])
        atol = 1.01 / 255 if name == "pixelate" else 1e-5
        assert torch.allclose(in_floats(x, name, severity), expected, atol=atol), severity


# ----- blurs and maps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", [c for c in ALL if "blur" in c or c[:5] in ("elast", "pixel")])
def test_blurs_leave_a_flat_image_as_it_is(corruption):
    """No dark borders, kernels sum to 1.

    Fails if borders are padded with zeros, or if the disk's soft edge is cut off.
    """
    large = GREY[:2, :, :1, :1].expand(-1, -1, 224, 224)
    for severity in range(1, 6):
        assert torch.equal(run(GREY, corruption, severity), GREY)
        assert torch.equal(run(large, corruption, severity), large)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1.0, 3.0])
def test_gaussian_blur_equals_torchvision_inside(sigma):
    """Away from the borders. Fails if sigma is taken for a variance, or if weights do not sum to 1."""
    x, r = LARGE.float() / 255, int(4 * sigma + 0.5)
    inside = slice(r, 224 - r)
    ours = gaussian_blur(x, sigma)[..., inside, inside]
    torchvision = v2.gaussian_blur(x, [2 * r + 1] * 2, [sigma] * 2)[..., inside, inside]
    assert torch.allclose(ours, torchvision, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_copies_as_the_published_loop(reach):
    """Pixel by pixel from the last to the first, each a copy of one -reach to reach - 1 px away.

    Fails if two pixels change places, if a copy may come from `reach` away, or if chains are cut short.
    """
    x, u = torch.rand(2, 3, 24, 24), torch.rand(2, 2, 2, 24, 24)
    move = (u * 2 * reach).long() - reach
    expected = x.clone()
    for image, moves in zip(expected, move):
        for n in range(2):
            for h in range(24 - reach, reach, -1):
                for w in range(24 - reach, reach, -1):
                    dy, dx = moves[n, :, h, w].tolist()
                    image[:, h, w] = image[:, h + dy, w + dx]
    assert torch.equal(shuffle_locally(x, reach, 2, u), expected)


def test_motion_blur_is_one_sided_and_follows_its_angle():
    """A white dot grows a tail of Gaussian weights to one side.

    Fails if the kernel is symmetric, or if x and y are exchanged.
    """
    dot = torch.zeros(2, 1, 33, 33)
    dot[:, :, 16, 16] = 1
    y = motion_blur(dot, 4, 2.0, torch.tensor([0.0, 90.0]))
    weights = torch.exp(-torch.arange(9.0) ** 2 / 8)
    assert torch.allclose(y[0, 0, 16, 8:17].flip(0), weights / weights.sum(), atol=1e-6)
    assert torch.allclose(y[1, 0, 8:17, 16].flip(0), weights / weights.sum(), atol=1e-6)
    assert y.sum().item() == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("z, inner, outer, trim", [
    (1.02, 32, 33, 0), (1.25, 26, 32, 0), (3.0, 11, 33, 0), (4.5, 8, 36, 2)])
def test_zoom_is_scipys_on_the_middle(z, inner, outer, trim):
    """On a ramp: corner on corner, linear between, S from pixel `trim` on; worked out by hand for 32 px.

    Fails if the crop is centred to the half pixel, as torchvision's affine map is.
    """
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    expected = (32 - inner) // 2 + (trim + torch.arange(32.0)) * (inner - 1) / (outer - 1)
    assert torch.allclose(zoom(ramp, z)[0, 0, 5], expected, atol=1e-4)
    assert torch.allclose(zoom(ramp.mT, z)[0, 0, :, 5], expected, atol=1e-4)


def test_zoom_blur_takes_the_last_zoom_where_rounding_does():
    """numpy's arange(1, 1.06, 0.01) has seven values, with 1.06: published at severity 1, 32 px.

    Fails if the zooms end below 1.06, which makes 3.8 of a strength of 8.7 on photographs.
    """
    x = SMALL[:4].float() / 255
    seven = [1, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06]
    expected = (x + sum(zoom(x, z) for z in seven)) / 8
    assert torch.allclose(in_floats(SMALL[:4], "zoom_blur", 1), expected, atol=1e-4)
