"""Small vision transformers for 32 px images, for --arch, --foundation and --target.

    python tools/pretrain.py --arch results/networks/vit.py:mixed --dataset cifar100 --optimizer adamw \
        --lr 2e-3 --weight-decay 0.05 --epochs 36

torchvision's VisionTransformer, made small.
"""

from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer


def transformer(num_classes: int, patch: int, blocks: int, width: int, stem=None) -> VisionTransformer:
    """(32 / patch)^2 tokens and the class token.  (B, 3, 32, 32) -> (B, num_classes)."""
    return VisionTransformer(image_size=32, patch_size=patch, num_layers=blocks, num_heads=4,
                             hidden_dim=width, mlp_dim=4 * width, num_classes=num_classes,
                             conv_stem_configs=stem)


def mixed(num_classes: int) -> VisionTransformer:
    """Four 3x3 convolutions with BatchNorm (Xiao et al. 2021), then four blocks on 16 tokens."""
    stem = [ConvStemConfig(32, 3, 1), ConvStemConfig(64, 3, 2), ConvStemConfig(128, 3, 2),
            ConvStemConfig(128, 3, 2)]
    return transformer(num_classes, 8, 4, 128, stem)


def small(num_classes: int) -> VisionTransformer:
    """A target: four blocks on 64 tokens, no convolution but that of the patches."""
    return transformer(num_classes, 4, 4, 64)
