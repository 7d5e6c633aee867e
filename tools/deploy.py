"""What comes after gdfq.py: rebuild a network from the integers of quantized.pt, and measure it.

    python tools/deploy.py evaluate runs/gdfq/fashion_resnet20_w4a4/seed0/quantized.pt

The last line is the top-1 accuracy, equal to the run's own: the integers reproduce every logit.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import InputError  # noqa: E402
from gdfq import float_state, quantize, quantized_layers  # noqa: E402
from tools.weights import check_kinds, same_classes  # noqa: E402

KINDS = {"codes": Tensor, "steps": Tensor, "zeros": Tensor, "floats": Tensor, "arch": str,
         "dataset": str, "classes": list, "mean": list, "std": list, "size": int, "wbits": int,
         "abits": int, "first_last_bits": (int, type(None)), "transform_input": bool}


def build_parser() -> argparse.ArgumentParser:
    p = common.Parser(prog="tools/deploy.py", description=__doc__)
    p.add_argument("what", choices=["evaluate"], help="evaluate: top-1 on the test images")
    p.add_argument("file", help="a quantized.pt")
    p.add_argument("--arch", help="where the file holds a network of yours: the FILE.py:NAME again")
    p.add_argument("--dataset", help="as in gdfq.py; None: the one that the file names")
    p.add_argument("--data-dir", default="data", help="where cifar and imagenet lie")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    return p


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of common.pack_bits: n codes, flat, uint8."""
    b = np.unpackbits(packed.cpu().numpy(), count=n * bits).reshape(n, bits)
    weights = 2 ** np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return torch.from_numpy((b * weights).sum(1, dtype=np.uint8))


@torch.no_grad()
def unpack(packed: dict, model: nn.Module, example: Tensor) -> nn.Module:
    """The quantized network of gdfq.pack, in eval mode. `model` is of the same architecture, with any
    weights, and not touched; example (B, ...): an input of it.

    Every logit is reproduced to the bit. Raises InputError where the two do not belong together.
    """
    q = quantize(model, example, packed["wbits"], packed["abits"], packed["first_last_bits"])
    layers, floats = quantized_layers(q), float_state(q)
    bits = [layer.parametrizations.weight[0].bits for layer in layers]
    channels = [layer.weight.shape[0] for layer in layers]
    sizes = [math.ceil(layer.weight.numel() * k / 8) for layer, k in zip(layers, bits)]
    lengths = [t.numel() for t in floats]
    expected = {"codes": sizes, "steps": channels, "zeros": channels, "floats": lengths}
    for key, parts in expected.items():
        t, dtype = packed[key], torch.uint8 if key in ("codes", "zeros") else torch.float32
        if t.shape != (sum(parts),) or t.dtype != dtype or t.is_meta:
            raise InputError(f"the file has {key} {tuple(t.shape)} of {t.dtype}, the network needs "
                             f"({sum(parts)},) of {dtype}: another network's?")
    codes, steps, zeros = (packed[key].split(expected[key]) for key in ("codes", "steps", "zeros"))
    for layer, k, code, s, zero in zip(layers, bits, codes, steps, zeros):
        shape = layer.weight.shape
        to = (-1,) + (1,) * (len(shape) - 1)
        code = unpack_bits(code, k, shape.numel()).view(shape).float()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        w = torch.empty_like(layer.weight).copy_(s.view(to) * (code - zero.float().view(to)))
        layer.weight = nn.Parameter(w)  # x_hat = s (q + z); its own, also where two layers shared one
    for t, part in zip(floats, packed["floats"].split(lengths)):
        t.copy_(part.view(t.shape))
    return q


def rebuild(file: str, arch: str | None = None) -> tuple[nn.Module, dict]:
    """The network of a quantized.pt, in eval mode on the CPU, and what else the file says."""
    packed = common.load_file(file, tuple(KINDS), "a quantized.pt of gdfq.py (of pack alone: unpack it)")
    check_kinds(packed, KINDS, file, "gdfq.py")
    if ":" in packed["arch"] and packed["arch"] != arch:  # a file of weights does not choose what is run
        raise InputError(f"{file}: holds a {packed['arch']}; repeat that behind --arch")
    model = common.build_model(packed["arch"], len(packed["classes"]))
    model.to(memory_format=torch.channels_last)
    model.transform_input = packed["transform_input"]
    example = torch.zeros(1, 3, packed["size"], packed["size"])
    return unpack(packed, model, example), packed


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args.device)
    q, packed = rebuild(args.file, args.arch)
    try:
        data = common.load_data(args.dataset or packed["dataset"], args.data_dir, packed["size"])
    except InputError as e:
        raise InputError(f"{e}" + "; --dataset names another" * (args.dataset is None)) from None
    if len(data.classes) != len(packed["classes"]):
        raise InputError(f"{args.file}: made for {len(packed['classes'])} classes; {data.name} has "
                         f"{len(data.classes)}")
    same_classes(q, packed["classes"], data, args.file)
    print(f"{args.file}: {packed['arch']} W{packed['wbits']}A{packed['abits']} on {data.name}")
    data = data._replace(mean=packed["mean"], std=packed["std"])
    print(f"top-1 {common.accuracy_pct(q.to(device), data, data.test, device):.2f} %")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
