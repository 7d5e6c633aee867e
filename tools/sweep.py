"""Do the three scripts take a network? Tries every torchvision classifier, and any network of timm.

    python tools/sweep.py                                  # results/sweep.md, half an hour on two cores
    python tools/sweep.py resnet18 timm:convnextv2_nano    # these alone, printed

A row is a network with random weights. Its BatchNorm statistics are those of two noise images. Random
weights show the largest errors; for those of trained networks see gdfq.md.

    layers     how many of the Conv and Linear layers gdfq.py quantizes
    fp32 %     share of the parameters that stay fp32: norm layers, biases, what no quantizer knows
    8-bit %    relative error of the logits at W8A8, with ranges from the same images
    unpack     whether the packed integers give the logits of the quantized network to the bit
    source     whether the logits stay as they are once cema.py's norm layers can adapt (--bn source)
    taps, f    depths from which tdmr.py takes features, and how many numbers per image those are
"""

import argparse
import gc
import importlib.util
import sys
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import gdfq  # noqa: E402
import tdmr  # noqa: E402
from common import InputError, door  # noqa: E402
from tools import deploy  # noqa: E402

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
# Thirty families, the smallest of each: convolutions, attention, both, and odd activations.
TIMM = """beit_base_patch16_224 cait_xxs24_224 coatnet_nano_rw_224 convit_tiny convmixer_768_32
convnextv2_atto crossvit_9_240 cspresnet50 deit_tiny_patch16_224 densenet121 dla34 dpn68
edgenext_xx_small efficientnet_lite0 efficientformer_l1 fastvit_t8 ghostnet_100 hardcorenas_a
hrnet_w18_small levit_128s mixer_s16_224 mobilenetv3_small_050 mobilevit_xxs nf_resnet26
poolformer_s12 regnetx_002 repvgg_a0 resnest14d tf_efficientnet_b0 vit_tiny_patch16_224""".split()


def build_parser() -> common.Parser:
    p = common.Parser("tools/sweep.py", __doc__)
    p.add_argument("names", nargs="*", help="networks, those of timm as timm:<name>; none: all of "
                   "torchvision, and 30 of timm where it is installed")
    a = p.group("options")
    a("--max-params", 100.0, "millions of parameters of the largest network")
    a("--out", "results/sweep.md", "page to write, where no names are given")
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def build(name: str) -> tuple[nn.Module, int]:
    """The network in eval mode, and the side of its images."""
    if not name.startswith("timm:"):
        return common.build_model(name, 1000).eval(), 299 if name == "inception_v3" else 224
    with door("no timm here: pip install timm"):
        import timm
    net = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    return net.eval(), net.default_cfg["input_size"][-1]


@torch.no_grad()
def settle(net: nn.Module, x: Tensor) -> None:
    """Gives net BatchNorm statistics of the batch x: with 0 and 1 deep networks overflow or fade.

    A head of zeros, with which vision transformers begin, gets random weights.
    """
    for m in net.modules():
        if isinstance(m, nn.Linear) and not m.weight.any():
            nn.init.normal_(m.weight, std=0.02)
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    for m in layers:
        m.momentum = 1.0
        m.training = True
    net(x)
    for m in layers:
        m.momentum = 0.1
        m.training = False


@torch.no_grad()
def quantized(net: nn.Module, x: Tensor) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stays fp32 is a column here
        q = gdfq.quantize(net, x, 8, 8)
    layers, out, want = deploy.quantized_layers(q), q(x), net(x)
    n = sum(isinstance(m, LAYERS) for m in net.modules())
    small = sum(m.parametrizations.weight.original.numel() for m in layers)
    share = 100 - 100 * small / sum(p.numel() for p in net.parameters())
    error = 100 * ((out - want).norm() / want.norm()).item()
    packed, other = deploy.pack(q), common.copy_of(net)
    for p in other.parameters():
        p.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = torch.equal(deploy.unpack(packed, other, x)(x), out)
    return [f"{len(layers)} of {n}", f"{share:.1f}", f"{error:.1f}", "exact" if exact else "DIFFERS"]


@torch.no_grad()
def adaptable(net: nn.Module, x: Tensor) -> list[str]:
    same = common.configure(net, "source", ["bn", "ln", "gn"])[0](x)
    return ["same" if torch.allclose(same, net(x), rtol=1e-3, atol=1e-3) else "DIFFERS"]


def features(net: nn.Module, x: Tensor) -> list[str]:
    foundation = tdmr.Foundation(net, x.shape[-1], [0.5] * 3, [0.5] * 3)
    extractor = tdmr.Extractor(foundation, 9, x.device, False)
    image = torch.zeros(1, 3, x.shape[-1], x.shape[-1], dtype=torch.uint8)
    width = extractor(image).shape[1]
    return [f"{len(extractor.seen) - 1}", f"{width}"]


def row(name: str, most: float) -> list[str] | None:
    """The cells of a network; None where it is larger than `most` million parameters."""
    torch.manual_seed(0)
    net, size = build(name)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    if millions > most:
        return None
    x = torch.randn(2, 3, size, size)
    settle(net, x)
    cells = [name, f"{millions:.1f}"]
    for check, width in ((quantized, 4), (adaptable, 1), (features, 2)):
        try:
            cells += check(net, x)
        except InputError as e:
            cells += [" ".join(str(e).split())[:90]] + [""] * (width - 1)
    return cells


def all_names() -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    if importlib.util.find_spec("timm"):
        return names + [f"timm:{name}" for name in TIMM]
    print("note: no timm here; pip install timm for 30 of its networks")
    return names


def main(args: argparse.Namespace) -> None:
    t0, rows, page = time.perf_counter(), [], Path(args.out)
    page.parent.mkdir(parents=True, exist_ok=True)
    for name in args.names or all_names():
        cells = row(name, args.max_params)
        if cells:
            rows.append(cells)
            print(" | ".join(cells), flush=True)
        gc.collect()
    if not args.names:
        write_page(page, rows, (time.perf_counter() - t0) / 60)


def write_page(page: Path, rows: list[list[str]], minutes: float) -> None:
    heads = ["network", "params, M", "layers", "fp32 %", "8-bit %", "unpack", "source", "taps", "f"]
    lines = [heads, ["---"] + ["---:"] * 4 + ["---"] * 2 + ["---:"] * 2, *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    made = f"`{common.command()}`, {len(rows)} networks, torch {torch.__version__}"
    intro = __doc__.split("\n\n", 2)[2]
    title = "# Which networks the scripts take"
    page.write_text(f"{title}\n\n{made}, {minutes:.0f} minutes.\n\n{intro}\n{table}\n")
    print(f"{page}: {len(rows)} networks")


if __name__ == "__main__":
    common.run(main, parse)
