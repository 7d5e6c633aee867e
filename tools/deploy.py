"""What comes after gdfq.py: the network of a quantized.pt, measured, checked, exported.

    python tools/deploy.py evaluate <out>/quantized.pt          # top-1: the run's own, to the bit
    python tools/deploy.py info <out>/quantized.pt              # layers, bits, bytes, and two bounds
    python tools/deploy.py check <out>/quantized.pt             # the same in integer arithmetic
    python tools/deploy.py export <out>/quantized.pt model.pt2  # for torch.export.load, with torch alone
    python tools/deploy.py export <out>/quantized.pt model.onnx # where onnx and onnxscript are installed

check needs integers at the input of every layer: of a network made with gdfq.py --quantize-input
--quantize-add --quantize-pool; a layer that reads fp32 is named and stays in fp32.
"""

import argparse
import gzip
import importlib
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import ActivationQuantizer, InputError, door, need  # noqa: E402
from gdfq import layer_inputs, quantize  # noqa: E402

KINDS = {"codes": Tensor, "steps": Tensor, "zeros": Tensor, "floats": Tensor, "arch": str,
         "dataset": str, "classes": list, "mean": list, "std": list, "size": int, "wbits": int,
         "abits": int, "first_last_bits": (int, type(None)), "also": list, "transform_input": bool}


def build_parser() -> argparse.ArgumentParser:
    p = common.Parser("tools/deploy.py", __doc__)
    p.add_argument("what", choices=["evaluate", "info", "check", "export"], help="see above")
    p.add_argument("file", help="a quantized.pt")
    p.add_argument("to", nargs="?", help="of export: the file to write, .pt2 or .onnx")
    a = p.group("options")
    a("--arch", None, "where the file holds a network of yours: the FILE.py:NAME again")
    a("--dataset", None, "as in gdfq.py; None: the one that the file names")
    a("--data-dir", "data", "where cifar and imagenet lie")
    a("--device", "auto", "auto, cpu, cuda, mps")
    return p


# ===== The packed file ================================================================================


def quantized_layers(q: nn.Module) -> list[nn.Module]:
    return [m for m in q.modules() if parametrize.is_parametrized(m, "weight")]


def float_state(q: nn.Module) -> list[Tensor]:
    """What stays fp32 in the packed file: biases, BN affine and statistics, activation ranges."""
    named = q.state_dict(keep_vars=True).items()
    return [t for name, t in named if t.is_floating_point() and not name.endswith("weight.original")]


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits -> flat uint8, ceil(n bits / 8) bytes, most significant bit first."""
    places = torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=q.device)
    b = (q.flatten()[:, None] >> places) & 1  # (n, bits)
    return torch.from_numpy(np.packbits(b.cpu().numpy()))


@torch.no_grad()
def pack(q: nn.Module) -> dict:
    """The integers that a device would store, as four flat tensors; `unpack` reads them back.

    codes   uint8, wbits per weight: 4-bit codes lie two in a byte
    steps   fp32, one s per output channel;  zeros  uint8, one -z per output channel
    floats  fp32, float_state
    and wbits, abits, first_last_bits, also, as gdfq.quantize takes them
    """
    codes, steps, zeros, floats = [], [], [], [t.detach().cpu().flatten() for t in float_state(q)]
    for layer in quantized_layers(q):
        quantizer = layer.parametrizations.weight[0]
        code, s, z = quantizer.codes(layer.parametrizations.weight.original)
        codes.append(pack_bits(code.to(torch.uint8), quantizer.bits))
        steps.append(s.flatten().cpu())
        zeros.append((-z).flatten().to(torch.uint8).cpu())
    parts = {"codes": codes, "steps": steps, "zeros": zeros, "floats": floats}
    return {k: torch.cat(v) for k, v in parts.items()} | q.meta["bits"]


def save(q: nn.Module, model: nn.Module, data: common.Data, args, path: Path) -> int:
    """Writes pack(q) and what `rebuild` needs besides to a quantized.pt; its size in bytes."""
    about = {"arch": args.arch, "dataset": args.dataset, "classes": data.classes, "mean": data.mean,
             "std": data.std, "size": data.size}
    # torchvision's Inception and GoogLeNet change it with their weights.
    about["transform_input"] = getattr(model, "transform_input", False)
    common.save_atomic(pack(q) | about, path)
    return path.stat().st_size


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of pack_bits: n codes, flat, uint8."""
    b = np.unpackbits(packed.cpu().numpy(), count=n * bits).reshape(n, bits)
    weights = 2 ** np.arange(bits - 1, -1, -1, dtype=np.uint8)
    return torch.from_numpy((b * weights).sum(1, dtype=np.uint8))


class Dequantize(nn.Module):
    """Codes (C_out, ...) uint8 -> weights s (q + z), fp32: what an exported file computes from them."""

    def __init__(self, s: Tensor, zero: Tensor, bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("s", s)
        self.register_buffer("zero", zero)

    def forward(self, code: Tensor) -> Tensor:
        return self.s * (code.float() - self.zero)


@torch.no_grad()
def unpack(packed: dict, model: nn.Module, example: Tensor, integers: bool = False) -> nn.Module:
    """The quantized network of `pack`, in eval mode. `model` is of the same architecture, with any
    weights, and not touched; example (B, ...): an input of it. integers: its layers hold the codes
    themselves, uint8, and dequantize them in every forward; else fp32 weights.

    Every logit is reproduced to the bit. Raises InputError where the two do not belong together.
    """
    bits = packed["wbits"], packed["abits"], packed["first_last_bits"]
    q = quantize(model, example, *bits, also=packed.get("also", []))
    layers, floats = quantized_layers(q), float_state(q)
    bits = [layer.parametrizations.weight[0].bits for layer in layers]
    channels = [layer.weight.shape[0] for layer in layers]
    sizes = [math.ceil(layer.weight.numel() * k / 8) for layer, k in zip(layers, bits)]
    lengths = [t.numel() for t in floats]
    expected = {"codes": sizes, "steps": channels, "zeros": channels, "floats": lengths}
    for key, parts in expected.items():
        t, dtype = packed[key], torch.uint8 if key in ("codes", "zeros") else torch.float32
        need(t.shape == (sum(parts),) and t.dtype == dtype and not t.is_meta, f"the file has {key} "
             f"{tuple(t.shape)} of {t.dtype}, the network needs ({sum(parts)},) of {dtype}: another's?")
    codes, steps, zeros = (packed[key].split(expected[key]) for key in ("codes", "steps", "zeros"))
    for layer, k, code, s, zero in zip(layers, bits, codes, steps, zeros):
        shape = layer.weight.shape
        to = (-1,) + (1,) * (len(shape) - 1)
        code = unpack_bits(code, k, shape.numel()).view(shape)
        weight = Dequantize(s.view(to), zero.float().view(to), k)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        # In the same memory format: sums in another order may round to another code.
        code = torch.empty_like(layer.weight, dtype=torch.uint8).copy_(code)
        del layer.weight
        if integers:
            layer.register_buffer("weight", code)
            parametrize.register_parametrization(layer, "weight", weight, unsafe=True)
        else:  # its own, also where two layers shared one
            layer.weight = nn.Parameter(weight(code))
            layer.register_buffer("step", weight.s, persistent=False)
    for t, part in zip(floats, packed["floats"].split(lengths)):
        t.copy_(part.view(t.shape))
    return q


def rebuild(file: str, arch: str | None = None, integers: bool = False) -> tuple[nn.Module, dict]:
    """The network of a quantized.pt, in eval mode on the CPU, and what else the file says."""
    needs = tuple(k for k in KINDS if k != "also")  # older files are of none
    packed = common.load_file(file, needs, "a quantized.pt of gdfq.py (of pack alone: unpack it)")
    for key, kind in KINDS.items():
        a = type(packed.get(key)).__name__
        need(key not in packed or isinstance(packed[key], kind), f"{file}: its {key} is a {a}, which "
             "gdfq.py does not write")
    with door(file):
        common.images_of(packed)
    # A file of weights does not choose what code is run.
    own = ":" in packed["arch"] and packed["arch"] != arch
    need(not own, f"{file}: holds a {packed['arch']}; repeat that behind --arch")
    model = common.build_model(packed["arch"], len(packed["classes"]))
    model.to(memory_format=torch.channels_last)
    model.transform_input = packed["transform_input"]
    example = torch.zeros(1, 3, packed["size"], packed["size"])
    return unpack(packed, model, example, integers), packed


# ===== Integer arithmetic =============================================================================


class IntegerCheck:
    """Every layer's output by integers: sums of products of codes, exact in int32, then scale and bias.

        y_c = s_x s_c  sum (q_x + z_x) (q_w + z_c)  +  bias_c

    Hooks put it in the place of the floats' output, and note the largest relative difference.
    """

    def __init__(self, q: nn.Module):
        self.worst, self.in_fp32 = {}, []
        calls = {}
        for name, source in layer_inputs(q):
            quantizer = q.get_submodule(source.target) if source.op == "call_module" else None
            calls.setdefault(name, []).append(quantizer)
        for name, quantizers in calls.items():
            if all(isinstance(m, ActivationQuantizer) for m in quantizers):
                self.watch(name, q.get_submodule(name), quantizers)
            else:
                self.in_fp32.append(name)

    @torch.no_grad()
    def watch(self, name: str, layer: nn.Module, quantizers: list[ActivationQuantizer]) -> None:
        # A layer that is called twice reads two tensors, in the same order every time.
        steps = itertools.cycle([common.step_and_zero(m.lo, m.hi, m.bits)[0] for m in quantizers])
        to = (-1,) + (1,) * (layer.weight.ndim - 2)
        s_w, bias = layer.step.view(to).double(), 0.0
        # The layer's own stride and padding: a padded 0 is the integer 0, too. Doubles hold integers up
        # to 2^53, so these sums are exact, in whatever order.
        sums_of = common.copy_of(layer).double()
        sums_of.weight.copy_(torch.round(layer.weight / layer.step))
        if layer.bias is not None:
            sums_of.bias.zero_()
            bias = layer.bias.view(to)
        self.worst[name] = 0.0

        def replace(layer, inputs, out):
            s_x = next(steps)
            sums = sums_of(torch.round(inputs[0] / s_x).double())
            need(sums.abs().max() < 2**31, f"{name}: a sum does not fit int32")
            y = (s_x.double() * s_w * sums + bias).float()
            apart = ((y - out).abs().max() / out.abs().max().clamp_min(1e-30)).item()
            self.worst[name] = max(self.worst[name], apart)
            return y
        layer.register_forward_hook(replace)


@torch.no_grad()
def check(q: nn.Module, data: common.Data, device: torch.device) -> None:
    """Prints how far each layer's integers lie from fake-quantized floats, and what answers differ."""
    torch.backends.cudnn.allow_tf32 = False
    integer, differ, right, margin = common.copy_of(q), 0, 0, 0.0
    watch = IntegerCheck(integer)
    for x, y in common.batches(data.test, 250 if data.size <= 64 else 50):
        x = common.to_input(x, data.mean, data.std, device)
        answers, logits = integer(x).argmax(1).cpu(), q(x).float().cpu()
        others = answers != logits.argmax(1)
        differ += others.sum().item()
        first, second = logits.topk(2, 1).values.T  # a value between two codes may fall to either
        margin = max([margin, *((first - second) / logits.abs().amax(1))[others].tolist()])
        right += (answers == y).sum().item()
    print(f"{'layer':<44}largest difference, relative")
    for name, apart in watch.worst.items():
        print(f"{name:<44}{apart:.1e}")
    for name in watch.in_fp32:
        print(f"{name:<44}reads fp32: gdfq.py --quantize-input --quantize-add --quantize-pool")
    n = len(data.test)
    near = f", where the two best logits lie within {margin:.1%}" * (differ > 0)
    print(f"{differ} of {n} answers differ{near}; top-1 {100 * right / n:.2f} % in integer arithmetic")


# ===== What the file holds ============================================================================


def info(q: nn.Module, packed: dict, size: int) -> None:
    """A line a layer, with a bar of its bytes; then the whole file beside two bounds."""
    names, layers, bound = {m: name for name, m in q.named_modules()}, quantized_layers(q), 0.0
    codes = [m.parametrizations.weight.original for m in layers]
    every = [m.parametrizations.weight[0].bits for m in layers]
    kB = [code.numel() * bits / 8000 for code, bits in zip(codes, every)]
    for layer, code, bits, k in zip(layers, codes, every, kB):
        p = torch.bincount(code.flatten().int()) / code.numel()
        bound -= code.numel() * (p * p.clamp_min(1e-30).log2()).sum().item() / 8000
        shape = "x".join(map(str, code.shape))
        bar = "#" * round(24 * k / max(kB))
        print(f"{names[layer]:<36}{shape:>18}{bits:>3} bits{k:>9.1f} kB  {bar}")
    rest = sum(packed[key].numel() * packed[key].element_size() for key in ("steps", "zeros", "floats"))
    print(f"{size / 1000:.1f} kB: codes {sum(kB):.1f} (their entropy: {bound:.1f}), steps, biases, "
          f"norms and ranges {rest / 1000:.1f}")
    fp32 = common.ROOT / "weights" / f"{packed['dataset']}_{common.short_name(packed['arch'])}.pt"
    if fp32.exists():
        whole = fp32.read_bytes()
        print(f"{fp32.name}: {len(whole) / 1000:.1f} kB, by gzip {len(gzip.compress(whole)) / 1000:.1f}")


# ===== Export =========================================================================================


@torch.no_grad()
def export(q: nn.Module, size: int, to: Path) -> None:
    """Writes the network, its weights as integers, any number of images a batch; then reads it back."""
    example = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(q, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        # The rest of it is half of the file, and full of this machine's paths.
        node.meta = {k: v for k, v in node.meta.items() if k in ("val", "unbacked_bindings")}
    to.parent.mkdir(parents=True, exist_ok=True)
    tmp = to.with_name(f"{to.stem}.{os.getpid()}.tmp{to.suffix}")
    try:
        if to.suffix == ".pt2":
            torch.export.save(program, tmp)
            again = torch.export.load(tmp).module()
        else:
            again = export_onnx(program, example, tmp)
        apart = (again(example[:2]) - q(example[:2])).abs().max().item() if again else math.nan
        os.replace(tmp, to)
    finally:
        tmp.unlink(missing_ok=True)
    checked = f"its logits lie within {apart:.0e}" if again else "not run: no onnxruntime"
    print(f"{to}: {to.stat().st_size / 1000:.1f} kB; {checked}")


def export_onnx(program, example: Tensor, to: Path):
    """Writes the .onnx; what runs it, x -> logits, or None without onnxruntime."""
    with door("export to .onnx needs two packages, pip install onnx onnxscript"):
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    torch.onnx.export(program, (example,), to, dynamo=True, external_data=False, verbose=False)
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(to))
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


# ===== Run ============================================================================================


def main(args: argparse.Namespace) -> None:
    to = Path(args.to or "")
    need((args.what == "export") == (to.suffix in (".pt2", ".onnx")), f"{args.what} {args.to or ''}: "
         "export needs a file to write, .pt2 or .onnx, and the others take none")
    device = common.pick_device(args.device)
    q, packed = rebuild(args.file, args.arch, integers=args.what in ("export", "info"))
    if args.what == "export":
        return export(q, packed["size"], to)
    if args.what == "info":
        return info(q, packed, Path(args.file).stat().st_size)
    try:
        data = common.load_data(args.dataset or packed["dataset"], args.data_dir, packed["size"])
    except InputError as e:
        hint = "" if args.dataset else "; --dataset names another"
        raise InputError(f"{e}{hint}") from None
    n = len(packed["classes"])
    need(len(data.classes) == n, f"{args.file}: made for {n} classes; {data.name} has "
         f"{len(data.classes)}")
    common.same_classes(q, packed["classes"], data, args.file)
    print(f"{args.file}: {packed['arch']} W{packed['wbits']}A{packed['abits']} on {data.name}")
    data = data._replace(mean=packed["mean"], std=packed["std"])
    if args.what == "check":
        return check(q.to(device), data, device)
    print(f"top-1 {common.accuracy_pct(q.to(device), data, data.test, device):.2f} %")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
