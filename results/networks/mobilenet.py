"""A MobileNetV3 for 32 px images, for --target.

    python tdmr.py --target results/networks/mobilenet.py:small

torchvision's MobileNetV3, made small.
"""

from functools import partial

from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3


def small(num_classes: int) -> MobileNetV3:
    """Six inverted residuals with depthwise convolutions, squeeze-and-excitation and hard-swish, as in
    MobileNetV3-Small, but with a quarter of its total stride: at 32 px the last feature map is 4 x 4.

    (B, 3, 32, 32) -> (B, num_classes)
    """
    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [block(16, 3, 16, 16, True, "RE", stride=1),
              block(16, 3, 72, 24, False, "RE", stride=2),
              block(24, 3, 88, 24, False, "RE", stride=1),
              block(24, 5, 96, 40, True, "HS", stride=2),
              block(40, 5, 120, 48, True, "HS", stride=1),
              block(48, 5, 144, 48, True, "HS", stride=1)]
    return MobileNetV3(blocks, last_channel=256, num_classes=num_classes)
