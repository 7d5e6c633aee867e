"""A small vision transformer for 32 px images, for --arch and --foundation.

    python tools/pretrain.py --arch results/networks/vit.py:mixed --dataset cifar100 --optimizer adamw \
        --lr 2e-3 --weight-decay 0.05 --epochs 36
    python tools/pretrain.py --arch results/networks/vit.py:plain --dataset cifar100 --optimizer adamw \
        --lr 1e-3 --weight-decay 0.05 --label-smoothing 0.1 --epochs 24

torchvision's VisionTransformer, made small.
"""

from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer


def mixed(num_classes: int) -> VisionTransformer:
    """Four 3x3 convolutions with BatchNorm (Xiao et al. 2021), then four blocks on 17 tokens.

    (B, 3, 32, 32) -> (B, num_classes)
    """
    stem = [ConvStemConfig(32, 3, 1), ConvStemConfig(64, 3, 2), ConvStemConfig(128, 3, 2),
            ConvStemConfig(128, 3, 2)]
    return VisionTransformer(image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128,
                             mlp_dim=512, num_classes=num_classes, conv_stem_configs=stem)


def plain(num_classes: int) -> VisionTransformer:
    """No convolution but the patch projection: six blocks on 65 tokens.  (B, 3, 32, 32) -> (B, num_classes)"""
    return VisionTransformer(image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192,
                             mlp_dim=384, num_classes=num_classes)


def tiny(num_classes: int) -> VisionTransformer:
    """As small as a ResNet-8: three blocks on 65 tokens.  (B, 3, 32, 32) -> (B, num_classes)"""
    return VisionTransformer(image_size=32, patch_size=4, num_layers=3, num_heads=3, hidden_dim=48,
                             mlp_dim=96, num_classes=num_classes)
