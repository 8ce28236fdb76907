"""The U-Net: predicts the training target from a noisy image, its timestep and its class.

The trunk works on patches: an orthonormal transform turns every p x p pixels into their frequencies
of colour, row and column, so that a 128x128 image enters as a 32x32 grid (p = 4). Depth then sits
at 32, 16 and 8, where the information of an enlarged 32x32 picture is.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wiener import WienerFilter, dct_matrix, root_mean_square

FILTER_SIZE = 5  # patches a side that the linear path from input to output looks at
MOST_GROUPS = 2**16 - 1  # of the backward pass of torch's group_norm on CUDA, where not compiled


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features (B, dim) of timesteps (B,), Vaswani et al. 2017, sec. 3.5; dim even."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def patch_basis(patch_size: int, channels: int) -> Tensor:
    """Orthonormal DCT-II basis of patches (C p^2, C, p, p): first their mean, then detail."""
    space, colour = dct_matrix(patch_size), dct_matrix(channels)
    basis = torch.einsum("kc,ui,vj->kuvcij", colour, space, space)
    return basis.reshape(channels * patch_size**2, channels, patch_size, patch_size).float()


def filter_each(x: Tensor, kernels: Tensor) -> Tensor:
    """Each channel of x (B, C, H, W) convolved with its own kernel, kernels (B, C * K * K)."""
    B, C, H, W = x.shape
    kernels = kernels.view(B * C, 1, FILTER_SIZE, FILTER_SIZE)
    filtered = F.conv2d(
        x.reshape(1, B * C, H, W), kernels, padding=FILTER_SIZE // 2, groups=B * C
    )
    return filtered.view(B, C, H, W)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with its parameters at zero, so that its branch starts as "no change"."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least four channels where their number allows it."""
    return nn.GroupNorm(math.gcd(32, channels // 4 or 1, channels), channels)


def conditioned_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift for x (B, C, H, W), scale and shift (B, C), in one pass.

    The images of the batch stand side by side as further groups, whose weights differ.
    """
    B, C, H, W = x.shape
    if B * norm.num_groups > MOST_GROUPS:
        return torch.addcmul(shift[:, :, None, None], norm(x), 1 + scale[:, :, None, None])
    weight = torch.addcmul(norm.weight, norm.weight, scale)
    bias = torch.addcmul(shift, norm.bias, 1 + scale)
    groups = x.reshape(1, B * C, H, W)
    x = F.group_norm(groups, B * norm.num_groups, weight.flatten(), bias.flatten(), norm.eps)
    return x.view(B, C, H, W)


class ResBlock(nn.Module):
    """Two convolutions with scale-shift conditioning (Dhariwal & Nichol 2021, sec. 3)."""

    def __init__(self, in_channels: int, out_channels: int, cond_dim: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(cond_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, C_in, H, W), cond (B, cond_dim) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        # In float32, because 1 + scale would lose most of scale's digits in bfloat16.
        scale, shift = self.condition(cond).float().chunk(2, dim=1)  # each (B, C_out)
        h = conditioned_norm(self.norm2, h, scale, shift)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions of a feature map, with a residual."""

    def __init__(self, channels: int, head_channels: int = 64):
        super().__init__()
        wanted = max(1, channels // head_channels)
        self.num_heads = max(n for n in range(1, wanted + 1) if channels % n == 0)
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> same shape."""
        B, C, H, W = x.shape
        # Position by position, because the fast kernels want the channels of each side by side.
        h = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, H * W, C)
        qkv = self.qkv(h).view(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, H * W, C / heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return x + self.out(h).transpose(1, 2).view(B, C, H, W)


class Stage(nn.Module):
    """A residual block followed, where asked for, by self-attention."""

    def __init__(
        self, in_channels: int, out_channels: int, cond_dim: int, dropout: float, attention: bool
    ):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, cond_dim, dropout)
        self.attention = SelfAttention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, C_in, H, W), cond (B, cond_dim) -> (B, C_out, H, W)."""
        return self.attention(self.res(x, cond))


def down_up_middle(
    stage: Callable[[int, int], Stage], widths: Sequence[int], num_res_blocks: Sequence[int]
) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList]:
    """The stages of a U-Net, down and up by level; `stage(in_channels, level)` makes one.

    A stage on the way up sees the output of one on the way down as well, the last of them first.
    """
    channels, skip_channels = widths[0], []
    down, up = nn.ModuleList(), nn.ModuleList()
    for level, blocks in enumerate(num_res_blocks):
        down.append(nn.ModuleList())
        for _ in range(blocks):
            down[-1].append(stage(channels, level))
            channels = widths[level]
            skip_channels.append(channels)
    middle = nn.ModuleList([stage(channels, len(widths) - 1) for _ in range(2)])
    for level in reversed(range(len(widths))):
        up.append(nn.ModuleList())
        for _ in range(num_res_blocks[level]):
            up[-1].append(stage(channels + skip_channels.pop(), level))
            channels = widths[level]
    return down, up, middle


class UNet(nn.Module):
    """Class-conditional U-Net; `forward(x_t, timesteps, class_labels)` has the shape of x_t.

    Three things beside the usual trunk make it learn in few steps. A learned position map is added
    to the first feature map, because at high noise a layout can come from nowhere else. The network
    only adds to the best linear guess from x_t, in units of what that leaves open; for this
    `measure` has to be given data before training. And since that guess is made for the data as a
    whole, a small linear filter per patch frequency, a function of the timestep, stands beside the
    trunk: it can take the guess back where more is known, as in memorising.

    Args:
        alphas_cumprod: of the noise schedule, (T,).
        prediction_type: the training target, as of CosineNoiseScheduler.
        image_size: height and width of x_t in pixels.
        num_classes: labels run 0..num_classes-1; `null_label` = num_classes means "no class".
        base_channels: level i has base_channels * channel_mult[i] channels.
        num_res_blocks: residual blocks per level on the way down, and as many on the way up.
        attention_sizes: feature map sizes, in positions a side, with self-attention.
        patch_size: pixels a side of the patches that the trunk sees as one position.
        largest_unit: of what the trunk adds to the linear guess, see WienerFilter.
        dropout: probability inside the residual blocks, in train mode only.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        prediction_type: str = "v_prediction",
        image_size: int = 128,
        num_classes: int = 10,
        in_channels: int = 3,
        base_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: Sequence[int] = (2, 3, 3),
        attention_sizes: Sequence[int] = (16, 8),
        patch_size: int = 4,
        largest_unit: float = 8.0,
        time_embed_dim: int = 128,
        class_embed_dim: int = 128,
        dropout: float = 0.0,
    ):
        super().__init__()
        levels = len(channel_mult)
        multiple = patch_size * 2 ** (levels - 1)
        if image_size % multiple:
            raise ValueError(
                f"image_size {image_size} must be a multiple of {multiple}: patches of "
                f"{patch_size} pixels, halved {levels - 1} times"
            )
        if len(num_res_blocks) != levels:
            raise ValueError(f"num_res_blocks {num_res_blocks} needs {levels} entries")
        self.patch_size, self.null_label = patch_size, num_classes
        self.time_embed_dim = time_embed_dim
        self.wiener = WienerFilter(
            alphas_cumprod, prediction_type, image_size, in_channels, largest_unit
        )

        self.time_mlp = nn.Sequential(
            nn.Linear(time_embed_dim, time_embed_dim),
            nn.SiLU(),
            nn.Linear(time_embed_dim, time_embed_dim),
            nn.SiLU(),
        )
        self.class_embedding = nn.Embedding(num_classes + 1, class_embed_dim)
        cond_dim = time_embed_dim + class_embed_dim

        # Learning in this basis takes fewer steps than on the bare pixels of a patch.
        self.register_buffer("basis", patch_basis(patch_size, in_channels), persistent=False)
        patch_channels, size = len(self.basis), image_size // patch_size
        self.input_filter = zeroed(nn.Linear(time_embed_dim, patch_channels * FILTER_SIZE**2))
        self.register_buffer("patch_std", torch.ones(patch_channels, 1, 1))
        widths = [base_channels * mult for mult in channel_mult]
        self.stem = nn.Conv2d(patch_channels, widths[0], 3, padding=1)
        self.position = nn.Parameter(0.5 * torch.randn(1, widths[0], size, size))

        def stage(in_channels: int, level: int) -> Stage:
            attention = size >> level in attention_sizes
            return Stage(in_channels, widths[level], cond_dim, dropout, attention)

        self.down, self.up, self.middle = down_up_middle(stage, widths, num_res_blocks)
        self.out_norm = group_norm(widths[0])
        self.out = zeroed(nn.Conv2d(widths[0], patch_channels, 3, padding=1))

    def forward(self, x_t: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """x_t (B, C, H, W), timesteps (B,), class_labels (B,) -> (B, C, H, W)."""
        time = self.time_mlp(timestep_embedding(timesteps, self.time_embed_dim))
        cond = F.silu(torch.cat([time, self.class_embedding(class_labels)], dim=1))
        # c_in of Karras et al. 2022, sec. 5, one for each patch frequency.
        alphas_cumprod = self.wiener.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        variance = alphas_cumprod * self.patch_std**2 + 1 - alphas_cumprod
        patches = self.patches(x_t) * variance.rsqrt()
        rest = self.trunk(patches, cond) + filter_each(patches, self.input_filter(time))
        rest = F.conv_transpose2d(rest, self.basis, stride=self.patch_size)  # (B, C, H, W)
        return self.wiener(x_t, timesteps, rest)

    def patches(self, x: Tensor) -> Tensor:
        """Frequencies of the patches of x (B, C, H, W): (B, C p^2, H / p, W / p)."""
        with torch.autocast(x.device.type, enabled=False):  # the high ones are small differences
            return F.conv2d(x.float(), self.basis, stride=self.patch_size)

    @torch.no_grad()
    def measure(self, x_start: Tensor) -> None:
        """Learn the power of each frequency from images (N, C, H, W)."""
        self.wiener.measure(x_start)
        patch_std = root_mean_square(self.patches, x_start, (0, 2, 3))  # over all patches
        self.patch_std.copy_(patch_std[:, None, None])

    def trunk(self, patches: Tensor, cond: Tensor) -> Tensor:
        """patches (B, C p^2, H / p, W / p), cond (B, cond_dim) -> the shape of patches."""
        h = self.stem(patches) + self.position
        skips = []
        for level, stages in enumerate(self.down):
            if level > 0:
                h = F.avg_pool2d(h, 2)
            for stage in stages:
                h = stage(h, cond)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, cond)
        for level, stages in enumerate(self.up):
            if level > 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), cond)
        return self.out(F.silu(self.out_norm(h)))
