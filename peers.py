"""Other networks for the same task, behind our signature, for `make bench ARGS=--peer` alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditional_diffusion.unet import timestep_embedding
from config import CLASS_NAMES

DIFFUSERS_CHANNELS = (64, 64, 128, 128, 256, 256)


class Diffusers(nn.Module):
    """diffusers' UNet2DModel with class embedding; attention at one level, as in its examples."""

    null_label = len(CLASS_NAMES)

    def __init__(self, image_size: int):
        from diffusers import UNet2DModel

        super().__init__()
        levels = len(DIFFUSERS_CHANNELS)
        down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
        down[-2], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
        self.network = UNet2DModel(
            sample_size=image_size, block_out_channels=DIFFUSERS_CHANNELS,
            down_block_types=tuple(down), up_block_types=tuple(up),
            num_class_embeds=len(CLASS_NAMES) + 1,
        )

    def forward(self, x_t: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return self.network(x_t, timesteps, class_labels=class_labels).sample


class Lucidrains(nn.Module):
    """denoising-diffusion-pytorch's Unet, dim 64, which knows no classes."""

    null_label = len(CLASS_NAMES)

    def __init__(self, image_size: int):
        from denoising_diffusion_pytorch import Unet

        super().__init__()
        self.network = Unet(dim=64, dim_mults=(1, 2, 4, 8))

    def forward(self, x_t: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return self.network(x_t, timesteps)


class PredecessorBlock(nn.Module):
    """Two convolutions with the conditions added in between."""

    def __init__(self, in_channels: int, out_channels: int, cond_dim: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, c) for c in (in_channels, out_channels)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(c, out_channels, 3, padding=1) for c in (in_channels, out_channels)]
        )
        self.condition = nn.Linear(cond_dim, out_channels)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        h = self.convs[0](F.silu(self.norms[0](x))) + self.condition(cond)[:, :, None, None]
        return self.skip(x) + self.convs[1](F.silu(self.norms[1](h)))


class Predecessor(nn.Module):
    """A re-creation of the network this project began with.

    Widths 64, 128, ... doubling at every halving from full resolution down to 8 positions a side,
    two residual blocks a level and way, one skip connection a level, no attention.
    """

    null_label = len(CLASS_NAMES)

    def __init__(self, image_size: int, base_channels: int = 64, embed_dim: int = 128):
        super().__init__()
        widths = [base_channels]
        while image_size // 2 ** len(widths) >= 8:
            widths.append(2 * widths[-1])
        cond_dim = 4 * embed_dim + embed_dim
        self.embed_dim = embed_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, 4 * embed_dim)
        )
        self.class_embedding = nn.Embedding(len(CLASS_NAMES) + 1, embed_dim)

        def blocks(in_channels: int, out_channels: int) -> nn.ModuleList:
            first = PredecessorBlock(in_channels, out_channels, cond_dim)
            return nn.ModuleList([first, PredecessorBlock(out_channels, out_channels, cond_dim)])

        self.stem = nn.Conv2d(3, base_channels, 3, padding=1)
        self.down = nn.ModuleList([blocks(width, width) for width in widths])
        self.middle = blocks(widths[-1], widths[-1])
        self.up = nn.ModuleList([blocks(2 * width, width) for width in widths[::-1]])
        pairs = list(zip(widths, widths[1:]))
        self.shrink = nn.ModuleList(
            [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs]
        )
        self.grow = nn.ModuleList(
            [nn.ConvTranspose2d(b, a, 3, 2, padding=1, output_padding=1) for a, b in pairs[::-1]]
        )
        self.out = nn.Conv2d(base_channels, 3, 3, padding=1)

    def forward(self, x_t: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        time = self.time_mlp(timestep_embedding(timesteps, self.embed_dim))
        cond = torch.cat([time, self.class_embedding(class_labels)], dim=1)
        h, skips = self.stem(x_t), []
        for level, blocks in enumerate(self.down):
            if level > 0:
                h = self.shrink[level - 1](h)
            for block in blocks:
                h = block(h, cond)
            skips.append(h)
        for block in self.middle:
            h = block(h, cond)
        for level, blocks in enumerate(self.up):
            if level > 0:
                h = self.grow[level - 1](h)
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = block(h, cond)
        return self.out(h)


PEERS = {
    "predecessor": Predecessor,
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": Lucidrains,
}
