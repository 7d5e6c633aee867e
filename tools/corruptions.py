"""The corruptions of ImageNet-C and CIFAR-10-C, made on the fly: 15, and 4 more to tune on.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019, arXiv 1903.12261. Definitions and parameters are the published ones, and the
strengths agree (table in results/cema.md). Random numbers, frost and the water of spatter are ours. The
published files were cut to whole bytes and, for ImageNet-C, stored as JPEG of quality 85. So results
are NOT comparable with numbers from those files.

    from tools.corruptions import corrupt
    y = corrupt(x, "fog", 5, torch.arange(len(x)))      # x uint8 (B, 3, S, S)

A corruption of your own is a line of OWN.
"""

import difflib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import InputError

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)
# For tuning, never in a reported mean.
HELD_OUT = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

# name -> function of images (B, 3, S, S) in [0, 1] and the severity, which gives such images; as in
#     "dusk": lambda x, severity: x * (1 - severity / 6)
OWN = {}

# Severity 1 to 5 for CIFAR-10-C (sides below 100 px), then severity 1 to 5 for ImageNet-C.
SEVERITIES = {
    # standard deviation
    "gaussian_noise": ((.04, .06, .08, .09, .10), (.08, .12, .18, .26, .38)),
    # photons of a white value
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    # share of values replaced
    "impulse_noise": ((.01, .02, .03, .05, .07), (.03, .06, .09, .17, .27)),
    # disk radius, sigma of its soft edge; px
    "defocus_blur": (((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
                     ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5))),
    # sigma px, reach of a copy px, rounds
    "glass_blur": (((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)),
                   ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    # radius, sigma; px
    "motion_blur": (((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
                    ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    # end, step: zooms 1, 1 + step, ... below the end
    "zoom_blur": (((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)),
                  ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03))),
    # of the flakes: mean, sd, zoom, threshold, radius, sigma; then x's share
    "snow": (((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
              (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)),
             ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
              (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55))),
    # share of the image, share of the ice
    "frost": (((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)),
              ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75))),
    # amount, decay of the roughness
    "fog": (((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)),
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    # added to HSV value
    "brightness": ((.05, .1, .15, .2, .3), (.1, .2, .3, .4, .5)),
    # share of contrast kept
    "contrast": ((.75, .5, .4, .3, .15), (.4, .3, .2, .1, .05)),
    # alpha, sigma, affine; 1 = 244 px of 224
    "elastic_transform": (
        ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03)),
        ((2, .7, .1), (2, .08, .2), (.05, .01, .02), (.07, .01, .02), (.12, .01, .02))),
    # side of the small image
    "pixelate": ((.95, .9, .85, .75, .65), (.6, .5, .4, .3, .25)),
    # quality
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    # standard deviation at white
    "speckle_noise": ((.06, .1, .12, .16, .2), (.15, .2, .35, .45, .6)),
    # sigma px
    "gaussian_blur": ((.4, .6, .7, .8, 1), (1, 2, 3, 4, 6)),
    # of the liquid: mean, sd, sigma px, threshold; then opacity (water), sigma of the edges px (mud)
    "spatter": (((.62, .1, .7, .7, .6), (.65, .1, .8, .7, .62), (.65, .3, 1, .69, .45),
                 (.65, .1, .7, .69, .6), (.65, .1, .5, .68, .6)),
                ((.65, .3, 4, .69, .6), (.65, .3, 3, .68, .8), (.65, .3, 2, .68, .9),
                 (.65, .3, 1, .65, 1.5), (.67, .4, 1, .65, 1.5))),
    # a, b: HSV saturation s -> a s + b
    "saturate": (((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)),
                 ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2))),
}


def known() -> list[str]:
    return [*CORRUPTIONS, *HELD_OUT, *OWN]


def corrupt(x: Tensor, corruption: str, severity: int, index: Tensor, seed: int = 0) -> Tensor:
    """The images under a corruption of ImageNet-C, on x's device.

    uint8 (B, 3, S, S) -> uint8 (B, 3, S, S). Severity is 1 to 5; 0 returns x. index (B,) numbers the
    images in their data set: image n gets the same corruption in every batch, because its random numbers
    depend on (seed, corruption, severity, n) alone.
    Raises InputError for an unknown corruption or severity.
    """
    if corruption not in known():
        near = difflib.get_close_matches(corruption, known(), 3, 0)
        raise InputError(f"corruption '{corruption}': not known; nearest names: {', '.join(near)}")
    if severity not in range(6):
        raise InputError(f"severity {severity}: expected 0 (clean), 1, 2, 3, 4 or 5")
    if severity == 0:
        return x
    each = image_streams(index, x.device, corruption, severity, seed)
    y = x.float() / 255
    if corruption in OWN:
        y = OWN[corruption](y, severity).clamp(0, 1)
    else:
        y = corrupted(y, corruption, severity, each)
    # Round, but with the edge off exactly .5, where means of a few 8-bit values often lie: there the
    # last bit of a sum decides, which may depend on device and batch size (on our CPUs it did not).
    return (255 * y + 0.499).to(torch.uint8)


def image_streams(index: Tensor, device: torch.device, corruption: str, severity: int, seed: int):
    """A function each(draw), which stacks draw(i, generator) over the images.

    The generator of image i depends on (seed, corruption, severity, index[i]) and on how many draws came
    before. Numbers are drawn on the CPU, so that every device sees the same.
    """
    g, calls = torch.Generator(), 0

    def each(draw) -> Tensor:
        nonlocal calls
        calls += 1
        sequence = np.random.SeedSequence((seed, severity, calls, *corruption.encode()))
        start = sequence.generate_state(1, np.uint64)[0]
        # An odd factor is one to one, in the low 32 bits, too, which are all that torch's CPU generator
        # reads of a seed.
        keys = np.asarray(index.tolist(), np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
        keys &= np.uint64(2**63 - 1)
        drawn = [draw(i, g.manual_seed(key)) for i, key in enumerate(keys.tolist())]
        return torch.stack(drawn).to(device)

    return each


def corrupted(x: Tensor, corruption: str, severity: int, each) -> Tensor:
    """`corrupt` in floats.  x (B, 3, S, S) in [0, 1] -> the same; `each` draws image by image."""
    S = x.shape[-1]
    p = SEVERITIES[corruption][S >= 100][severity - 1]

    def normal(*shape: int) -> Tensor:
        return each(lambda i, g: torch.randn(shape, generator=g))  # (B, *shape)

    def uniform(*shape: int, lo: float = 0, hi: float = 1) -> Tensor:
        return lo + (hi - lo) * each(lambda i, g: torch.rand(shape, generator=g))

    match corruption:
        case "gaussian_noise":
            x = x + p * normal(3, S, S)
        case "shot_noise":
            x = each(lambda i, g: torch.poisson((p * x[i]).cpu(), g)) / p
        case "impulse_noise":
            u = uniform(3, S, S)
            x = x.masked_fill(u < p / 2, 0).masked_fill(u > 1 - p / 2, 1)
        case "speckle_noise":
            x = x + p * x * normal(3, S, S)
        case "defocus_blur":
            x = disk_blur(x, *p)
        case "gaussian_blur":
            x = gaussian_blur(x, p)
        case "glass_blur":
            sigma, reach, rounds = p
            x = gaussian_blur(x, sigma)
            x = shuffle_locally(x, reach, rounds, uniform(rounds, 2, S, S))
            x = gaussian_blur(x, sigma)
        case "motion_blur":
            x = motion_blur(x, *p, uniform(lo=-45, hi=45))
        case "zoom_blur":
            zooms = np.arange(1, *p).tolist()  # rounding lets some of them reach their end: as published
            x = (x + sum(zoom(x, z) for z in zooms)) / (len(zooms) + 1)
        case "snow":
            loc, scale, z, threshold, radius, sigma, keep = p
            flakes = zoom(loc + scale * normal(1, S, S), z)
            flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
            flakes = motion_blur(flakes, radius, sigma, uniform(lo=-135, hi=-45))
            # whitened, as under snow light
            x = keep * x + (1 - keep) * torch.maximum(x, 1.5 * grey(x) + 0.5)
            x = x + flakes + flakes.rot90(2, (2, 3))
        case "frost":
            level = uniform(1, 1, lo=0.05, hi=0.5)
            x = p[0] * x + p[1] * ice(uniform(3, side_of_2(S), side_of_2(S)), level, S)
        case "fog":
            c, decay = p
            top = x.amax((1, 2, 3), keepdim=True)
            # Published code draws wibble * U(-wibble, wibble) and divides wibble by `decay`: the
            # amplitude falls by its square.
            fog = plasma(uniform(side_of_2(S), side_of_2(S), lo=-1), decay**2)[:, None, :S, :S]
            x = (x + c * fog) * top / (top + c)
        case "spatter":
            x = spatter(x, normal(1, S, S), *p, mud=severity > 3)
        case "brightness":
            # Scaling RGB moves HSV value and nothing else; black has no hue: it becomes grey.
            value = x.amax(1, keepdim=True)
            x = torch.where(value > 0, x / value.clamp_min(1e-6) * (value + p).clamp_max(1), p)
        case "contrast":
            mean = x.mean((2, 3), keepdim=True)
            x = (x - mean) * p + mean
        case "saturate":
            x = saturate(x, *p)
        case "elastic_transform":
            alpha, sigma, a = (v * S * (244 / 224 if S >= 100 else 1) for v in p)
            x = elastic(x, alpha, sigma, uniform(3, 2, lo=-a, hi=a), uniform(2, S, S, lo=-1))
        case "pixelate":
            # Pixels fall into int(c S) groups along each side; box-resizing down and up again is a mean
            # over the group.
            group = ((torch.arange(S, device=x.device) + 0.5) * int(p * S) / S).long()
            same = (group[:, None] == group).float()
            A = same / same.sum(1, keepdim=True)
            x = A @ x @ A.T
        case "jpeg_compression":
            from torchvision import io
            images = (255 * x + 0.5).to(torch.uint8).cpu()
            decoded = [io.decode_jpeg(io.encode_jpeg(image, p)) for image in images]
            x = torch.stack(decoded).to(x.device) / 255
    return x.clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """Luma (ITU-R 601).  (B, 3, S, S) -> (B, 1, S, S)."""
    from torchvision.transforms.v2 import functional as v2
    return v2.rgb_to_grayscale(x)


def zoom(x: Tensor, z: float) -> Tensor:
    """Magnify the middle by z >= 1, bilinear.  (B, C, S, S) -> (B, C, S, S).

    The middle ceil(S / z) pixels become round(z ceil(S / z)), corner on corner, of which S are kept.
    As in published code (scipy.ndimage.zoom), and up to a pixel off the centre, as there.
    """
    S = x.shape[-1]
    inner = math.ceil(S / z)
    outer = round(inner * z)
    line = torch.arange(S, dtype=torch.double)
    at = (S - inner) // 2 + ((outer - S) // 2 + line) * (inner - 1) / (outer - 1)
    A = (1 - (at[:, None] - line).abs()).clamp_min(0).to(x)
    return A @ x @ A.T


def side_of_2(S: int) -> int:
    """The power of two that holds S pixels."""
    return 2 ** math.ceil(math.log2(S))


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """G x G', rows of G a Gaussian cut at 4 sigma, mirrored at the borders.  (..., S, S) -> (..., S, S).

    Two products with an (S, S) matrix: for sigma = 6 px ten times as fast as a two-dimensional kernel,
    and sigma may exceed S.
    """
    S, r = x.shape[-1], int(4 * sigma + 0.5)
    k = torch.arange(-r, r + 1)
    w = torch.exp(-0.5 * (k / max(sigma, 1e-6)) ** 2)
    source = (torch.arange(S)[:, None] + k) % (2 * S)
    source = torch.minimum(source, 2 * S - 1 - source)  # c b a | a b c | c b a
    G = torch.zeros(S, S).scatter_add_(1, source, (w / w.sum()).expand(S, -1)).to(x.device)
    return G @ x @ G.T


def disk_blur(x: Tensor, radius: float, alias: float) -> Tensor:
    """Out of focus: the mean over a disk, its edge softened by a Gaussian of sigma `alias`.

    (B, C, S, S) -> the same.
    """
    from torchvision.transforms.v2 import functional as v2
    soft = 1 if radius <= 8 else 2
    r = math.floor(radius) + 2 * soft  # the soft edge must not meet the border: it would be mirrored
    k = torch.arange(-r, r + 1)
    disk = (k[:, None] ** 2 + k**2 <= radius**2).float()
    disk = v2.gaussian_blur((disk / disk.sum())[None, None], [2 * soft + 1] * 2, [alias] * 2)
    disk, r, C = disk[..., soft:-soft, soft:-soft], r - soft, x.shape[1]
    return F.conv2d(F.pad(x, (r,) * 4, mode="reflect"), disk.to(x.device).expand(C, 1, -1, -1), groups=C)


def motion_blur(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Weighted mean of copies shifted along each image's direction.

    Shifts are k = 0, 1, ..., 2 radius px, weights exp(-k^2 / 2 sigma^2).
    (B, C, S, S), degrees (B,) -> (B, C, S, S). One-sided, 2 radius + 1 taps on whole pixels, as in
    ImageMagick, with which the published files were made. Border pixels are repeated outwards.
    """
    (B, C, S, _), theta = x.shape, degrees.reshape(-1, 1) * math.pi / 180
    taps = min(2 * radius, math.ceil(4 * sigma)) + 1  # beyond 4 sigma nothing is left
    k = torch.arange(taps, device=x.device)
    w = torch.exp(-0.5 * (k / sigma) ** 2)
    line = torch.arange(S, device=x.device)
    dx, dy = (k * theta.cos()).round().long(), (k * theta.sin()).round().long()  # (B, taps)
    out, flat = torch.zeros_like(x), x.flatten(2)
    for j, weight in enumerate((w / w.sum()).tolist()):
        rows, cols = ((line + d[:, j:j + 1]).clamp(0, S - 1) for d in (dy, dx))  # (B, S)
        at = (rows[:, :, None] * S + cols[:, None]).flatten(1)  # (B, S S)
        out += weight * flat.gather(2, at[:, None].expand(B, C, -1)).view_as(x)
    return out


def shuffle_locally(x: Tensor, reach: int, rounds: int, u: Tensor) -> Tensor:
    """`rounds` times, each pixel takes the value of a random one, -reach to reach - 1 px away.

    x (B, C, S, S), u (B, rounds, 2, S, S) uniform -> (B, C, S, S). Published code sets out to swap two
    pixels; its right-hand side is two views, so that one is copied over the other. It goes from the last
    pixel to the first: what a pixel takes from one behind it, that one has taken before. Following such
    chains, twice as far in each turn, gives the same image.
    """
    B, C, S, _ = x.shape
    pixel = torch.arange(S * S, device=x.device).view(S, S)
    move = (u * 2 * reach).long().clamp_max(2 * reach - 1) - reach
    source = pixel.repeat(B, rounds, 1, 1)  # the border keeps its values
    inner = (..., slice(reach + 1, S - reach + 1), slice(reach + 1, S - reach + 1))
    source[inner] += (S * move[:, :, 0] + move[:, :, 1])[inner]
    x = x.flatten(2)
    for at in source.flatten(2).unbind(1):  # (B, S S)
        ends = at <= pixel.flatten()  # at one before it, which is still as it was
        while not ends.all():
            at, ends = torch.where(ends, at, at.gather(1, at)), ends | ends.gather(1, at)
        x = x.gather(2, at[:, None].expand(B, C, -1))
    return x.view(B, C, S, S)


def plasma(u: Tensor, decay: float) -> Tensor:
    """Diamond-square fractal, periodic, stretched to [0, 1].

    u (B, N, N) uniform in [-1, 1], N a power of two -> (B, N, N). Each new point is the mean of its four
    neighbours plus u at this point, times an amplitude divided by `decay` at each halving.
    """
    z, step, amplitude = torch.zeros_like(u), u.shape[-1], 1.0
    while step > 1:
        h = step // 2
        corner = z[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        centre = (pair + pair.roll(-1, 2)) / 4 + amplitude * u[:, h::step, h::step]
        z[:, h::step, h::step] = centre
        left = (pair + centre + centre.roll(1, 2)) / 4
        z[:, h::step, ::step] = left + amplitude * u[:, h::step, ::step]
        top = (corner + corner.roll(-1, 2) + centre + centre.roll(1, 1)) / 4
        z[:, ::step, h::step] = top + amplitude * u[:, ::step, h::step]
        step, amplitude = h, amplitude / decay
    lo, hi = z.amin((1, 2), keepdim=True), z.amax((1, 2), keepdim=True)
    return (z - lo) / (hi - lo)


def ice(u: Tensor, level: Tensor, S: int) -> Tensor:
    """Frost on a pane, ours: the published set blends in photographs, which we do not ship.

    u (B, 3, N, N) uniform, level (B, 1, 1), of the ice between the ferns -> (B, 3, S, S) in [0, 1].
    Ferns are level lines of two rough plasmas, S / 32 each; they grow where a smooth cloud is bright.
    """
    cloud = plasma(2 * u[:, 0] - 1, 2.2)
    rough = [plasma(2 * u[:, k] - 1, 1.75) for k in (1, 2)]
    ferns = [(1 - (S / 16 * z % 2 - 1).abs()) ** 3 for z in rough]  # 1 on a level line, thin
    frost = (level + 0.5 * cloud + 0.8 * cloud * torch.maximum(*ferns)).clamp(0, 1)
    return frost[:, None, :S, :S] * torch.tensor([0.86, 0.94, 1.0], device=u.device).view(3, 1, 1)


def spatter(x: Tensor, noise: Tensor, mean: float, sd: float, sigma: float, threshold: float, p: float,
            mud: bool) -> Tensor:
    """Drops of mud, which hide what is below, or of water, which lighten it.

    (B, 3, S, S), noise (B, 1, S, S) normal -> (B, 3, S, S). Mud as published. Water is ours: it grows
    with the depth of a drop; published code takes the distance to the edges that Canny finds.
    """
    liquid = gaussian_blur(mean + sd * noise, sigma)
    rgb = [63, 42, 20] if mud else [175, 238, 238]
    colour = torch.tensor(rgb, device=x.device).view(3, 1, 1) / 255
    if mud:
        m = gaussian_blur((liquid > threshold).float(), p)
        m = torch.where(m < 0.8, 0, m)
        return x * (1 - m) + m * colour
    depth = (liquid - threshold).clamp_min(0)
    return x + p * depth / depth.amax((1, 2, 3), keepdim=True).clamp_min(1e-6) * colour


def saturate(x: Tensor, a: float, b: float) -> Tensor:
    """HSV saturation s -> a s + b, hue and value fixed.  (B, 3, S, S) -> the same.

    Grey has hue 0: with b > 0 it turns red.
    """
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    s = (value - low) / value.clamp_min(1e-6)
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device).view(3, 1, 1)
    # 0 for the top channel, 1 for the lowest
    depth = torch.where(value > low, (value - x) / (value - low).clamp_min(1e-6), red)
    return value * (1 - depth * (a * s + b).clamp(0, 1))


def elastic(x: Tensor, alpha: float, sigma: float, shift: Tensor, u: Tensor) -> Tensor:
    """An affine map that moves three points by `shift`, then a displacement alpha * blurred u; in px.

    (B, 3, S, S), shift (B, 3, 2), u (B, 2, S, S) uniform in [-1, 1] -> (B, 3, S, S). `sigma` blurs u.
    Both maps are composed and sampled once.
    """
    S = x.shape[-1]
    c, d = S // 2, S // 3
    corners = [[c + d, c + d], [c + d, c - d], [c - d, c - d]]
    points = torch.tensor(corners, dtype=torch.float, device=x.device)
    one = torch.ones_like(shift[:, :, :1])
    moved = torch.cat([points + shift, one], 2)
    back = torch.linalg.solve(moved, points.expand_as(shift))  # (B, 3, 2): [x y 1] @ back
    grid = torch.arange(S, dtype=torch.float, device=x.device)
    at = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)  # (S, S, 2), pixel (x, y)
    if alpha:
        at = at + alpha * gaussian_blur(u, sigma).movedim(1, -1)
    at = F.pad(at.expand(len(x), S, S, 2), (0, 1), value=1.0).flatten(1, 2) @ back  # (B, S S, 2)
    at = ((2 * at + 1) / S - 1).view(-1, S, S, 2)  # grid_sample counts from -1 to 1
    return F.grid_sample(x, at, padding_mode="reflection", align_corners=False)
