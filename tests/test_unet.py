"""The U-Net: shapes, its start at zero, and that every input and parameter counts."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from conditional_diffusion import CosineNoiseScheduler, UNet, unet
from conditional_diffusion.unet import (
    ResBlock,
    SelfAttention,
    group_norm,
    patch_basis,
    timestep_embedding,
)
from config import ModelConfig


def inputs(batch_size: int, image_size: int = 16, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    return x_t, torch.arange(batch_size) * 7 % 50, torch.arange(batch_size) % 11


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"image_size": 24},
        {"patch_size": 1, "attention_sizes": (16, 8)},
        {"channel_mult": (1,), "num_res_blocks": (2,), "patch_size": 4},
        {"channel_mult": (1, 2, 3), "num_res_blocks": (2, 1, 3), "base_channels": 8},
    ],
    ids=["tiny", "image 24", "no patches", "one level", "uneven blocks"],
)
def test_output_has_the_shape_of_the_input(awake_model, overrides, batch_size):
    model = awake_model(**overrides)
    x_t, timesteps, labels = inputs(batch_size, overrides.get("image_size", 16))
    output = model(x_t, timesteps, labels)
    assert output.shape == x_t.shape and output.dtype == torch.float32
    assert output.isfinite().all() and output.any()


def calls_of_the_trunk(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(patches, output) of every call from now on."""
    calls, trunk = [], model.trunk

    def watched(patches, cond):
        calls.append((patches, trunk(patches, cond)))
        return calls[-1][1]

    model.trunk = watched
    return calls


@pytest.mark.parametrize("timestep", [0, 20, 49])
def test_trunk_sees_patch_frequencies_of_unit_variance(tiny_model, schedule, timestep):
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    strength = torch.linspace(2, 0.05, 12).view(1, 12, 1, 1)
    patches = strength * torch.randn(1000, 12, 8, 8, generator=generator)
    x_start = torch.nn.functional.conv_transpose2d(patches, model.basis, stride=2)
    model.measure(x_start)
    assert_close(model.patch_std.flatten(), strength.flatten(), rtol=0.02, atol=0)
    calls, timesteps = calls_of_the_trunk(model), torch.full((1000,), timestep)
    noise = torch.randn(x_start.shape, generator=generator)
    with torch.no_grad():
        model(schedule().add_noise(x_start, noise, timesteps), timesteps, timesteps * 0)
    spread = calls[0][0].std((0, 2, 3))
    assert_close(spread, torch.ones(12), rtol=0, atol=0.03)  # n = 64000, as the measurement's


def test_patch_frequencies_stay_in_full_precision_under_autocast(tiny_model):
    model, (x_t, *_) = tiny_model(), inputs(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.patches(x_t)
    assert_close(found, model.patches(x_t), rtol=0, atol=0)


def test_larger_units_make_more_of_what_the_trunk_says(awake_model):
    generator, outputs = torch.Generator().manual_seed(0), []
    strong = 20 * torch.randn(50, 3, 16, 16, generator=generator)
    for largest_unit in (2.0, 8.0):
        model = awake_model(largest_unit=largest_unit)
        model.measure(strong)
        x_t, timesteps, labels = inputs(2)
        timesteps.fill_(49)  # nearly all noise: all of the data is open
        guess = model.wiener(x_t, timesteps, torch.zeros_like(x_t))
        outputs.append(model(x_t, timesteps, labels) - guess)
    assert_close(outputs[1], 4 * outputs[0], rtol=1e-4, atol=1e-5)


def test_network_starts_as_the_linear_guess(tiny_model):
    model = tiny_model()
    model.measure(0.3 * torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    x_t, timesteps, labels = inputs(11)
    expected = model.wiener(x_t, timesteps, torch.zeros_like(x_t))
    assert expected.any()
    assert_close(model(x_t, timesteps, labels), expected, rtol=0, atol=0)


def test_dropout_acts_in_train_mode_only(awake_model):
    model, batch = awake_model(dropout=0.5), inputs(2)
    model.eval()
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.allclose(model(*batch), model(*batch), atol=1e-3)


def test_a_gradient_reaches_every_parameter(awake_model):
    model = awake_model()
    output = model(*inputs(4))
    # A random projection: a plain sum would hide parameters whose effects cancel.
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    silent = [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert silent == []


def test_label_timestep_and_position_change_the_output(awake_model):
    model = awake_model().eval()
    x_t, timesteps, labels = inputs(2)
    reference = model(x_t, timesteps, labels)
    outputs = {
        "label": model(x_t, timesteps, labels + 1),
        "null label": model(x_t, timesteps, torch.full_like(labels, model.null_label)),
        "timestep": model(x_t, timesteps + 1, labels),
    }
    with torch.no_grad():
        model.position.zero_()
    outputs["position"] = model(x_t, timesteps, labels)
    same = [name for name, o in outputs.items() if torch.allclose(o, reference, atol=1e-4)]
    assert same == []


def test_label_and_timestep_act_within_the_residual_blocks(awake_model):
    """Not only through the linear paths, which know the timestep on their own."""
    model = awake_model().eval()
    model.wiener.alphas_cumprod.fill_(0.5)  # makes it the same at all timesteps
    torch.nn.init.zeros_(model.input_filter.weight)
    torch.nn.init.zeros_(model.input_filter.bias)
    x_t, timesteps, labels = inputs(2)
    reference = model(x_t, timesteps, labels)
    assert not torch.allclose(model(x_t, timesteps + 5, labels), reference, atol=1e-4)
    assert not torch.allclose(model(x_t, timesteps, labels + 1), reference, atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other(awake_model):
    model = awake_model().eval()
    x_t, timesteps, labels = inputs(3)
    together = model(x_t, timesteps, labels)
    alone = [model(x_t[i : i + 1], timesteps[i : i + 1], labels[i : i + 1]) for i in range(3)]
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patch_basis_is_orthonormal_and_starts_with_the_mean(p):
    basis = patch_basis(p, 3).double().flatten(1)
    assert_close(basis @ basis.T, torch.eye(3 * p * p, dtype=torch.float64), rtol=0, atol=1e-6)
    # Equal entries of norm 1: the patch's mean over colours and pixels.
    mean = torch.full((3 * p * p,), (3 * p * p) ** -0.5, dtype=torch.float64)
    assert_close(basis[0], mean, rtol=0, atol=1e-6)


def test_timestep_embedding_is_the_sinusoid_formula():
    timesteps = [0, 1, 37, 999]
    expected = [
        [math.cos(t / 10_000 ** (i / 4)) for i in range(4)]
        + [math.sin(t / 10_000 ** (i / 4)) for i in range(4)]
        for t in timesteps
    ]
    # float32 angles up to 999 are good to 6e-5.
    assert_close(timestep_embedding(torch.tensor(timesteps), 8), torch.tensor(expected),
                 rtol=0, atol=2e-4)


@pytest.mark.parametrize("image_size", [18, 15, 2])
def test_indivisible_image_size_is_refused(tiny_model, image_size):
    with pytest.raises(ValueError, match=f"image_size {image_size} must be a multiple of 4"):
        tiny_model(image_size=image_size)


@pytest.mark.parametrize("num_res_blocks", [(1,), (1, 1, 1)])
def test_wrong_number_of_res_block_entries_is_refused(tiny_model, num_res_blocks):
    with pytest.raises(ValueError, match="num_res_blocks.*needs 2 entries"):
        tiny_model(num_res_blocks=num_res_blocks)


def test_default_model_is_the_one_that_checkpoints_hold():
    """Pinned: a change here makes every existing checkpoint unreadable and must be meant.

    Both numbers were read off the default model when it took its present form.
    """
    state = UNet(CosineNoiseScheduler().alphas_cumprod).state_dict()
    assert {name.split(".")[0] for name in state} == {
        "time_mlp", "class_embedding", "stem", "position", "down", "middle", "up", "out_norm",
        "out", "wiener", "patch_std", "input_filter",
    }
    assert len(state) == 300
    assert sum(p.numel() for p in state.values()) == 18_640_592


def test_defaults_agree_with_the_config():
    defaults = {name: p.default for name, p in inspect.signature(UNet).parameters.items()}
    config = vars(ModelConfig())
    assert {name: defaults[name] for name in config} == config


@pytest.mark.parametrize("base_channels", [1, 18, 50, 56, 100, 129])
def test_unusual_widths_work(tiny_model, base_channels):
    model = tiny_model(base_channels=base_channels, channel_mult=(1, 2))
    x_t = torch.randn(2, 3, 16, 16)
    assert model(x_t, torch.tensor([0, 5]), torch.tensor([1, 2])).shape == x_t.shape


def test_attention_is_the_formula():
    """Vaswani et al. 2017, eq. 1, head by head."""
    torch.manual_seed(0)
    block = SelfAttention(12, head_channels=4)
    nn.init.normal_(block.out.weight, std=0.3)
    x = torch.randn(2, 12, 3, 5)
    rows = block.norm(x).flatten(2).mT @ block.qkv.weight.T + block.qkv.bias  # (2, 15, 36)
    heads = []
    for first in (0, 4, 8):
        q, k, v = (part[:, :, first : first + 4] for part in rows.chunk(3, dim=2))
        heads.append((q @ k.mT / 4**0.5).softmax(-1) @ v)
    found = torch.cat(heads, dim=2) @ block.out.weight.T + block.out.bias
    expected = x + found.mT.reshape(2, 12, 3, 5)
    assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert block(x).is_contiguous(), "what follows would go on in a layout that is slow on a CPU"


@pytest.mark.parametrize("most_groups", [7, 8])  # of 2 images with 4 groups each
def test_residual_block_is_the_formula(monkeypatch, most_groups):
    """Dhariwal & Nichol 2021, sec. 3: norm, SiLU, convolution, twice; scale and shift between."""
    monkeypatch.setattr(unet, "MOST_GROUPS", most_groups)
    torch.manual_seed(0)
    block = ResBlock(8, 16, 6, 0.0)
    for parameter in (*block.norm1.parameters(), *block.norm2.parameters(), block.conv2.weight):
        nn.init.normal_(parameter, std=0.3)
    x, cond = torch.randn(2, 8, 5, 5), torch.randn(2, 6)
    h = F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    h = F.group_norm(h, 4, block.norm2.weight, block.norm2.bias)
    scale, shift = F.linear(cond, block.condition.weight, block.condition.bias).split(16, dim=1)
    h = F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    skip = F.conv2d(x, block.skip.weight, block.skip.bias)
    assert_close(block(x, cond), skip + h, rtol=1e-4, atol=1e-5)


def test_small_scales_of_a_residual_block_survive_bfloat16():
    """Whose numbers just above one are 1.0078 apart: 1 + 0.003 would be one."""
    torch.manual_seed(0)
    block, x, cond = ResBlock(8, 8, 4, dropout=0.0), torch.randn(2, 8, 32, 32), torch.zeros(2, 4)
    seen, exact = [], []
    block.dropout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float()))
    for scale in (0.0, 0.0029296875):  # exact in bfloat16
        block.condition.bias.data.zero_()[:8] = scale
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            block(x, cond)
            convolved = block.conv1(F.silu(block.norm1(x)))
        exact.append(F.silu(F.group_norm(convolved.float(), 2) * (1 + scale)))
    # Each number may be rounded, but together they move by what the scale moves them.
    moved, wanted = seen[1] - seen[0], exact[1] - exact[0]
    share = (moved * wanted).sum() / wanted.square().sum()
    assert_close(share, torch.tensor(1.0), rtol=0, atol=0.2)


def test_each_branch_starts_as_no_change():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResBlock(8, 8, 6, 0.0)(x, torch.randn(2, 6)), x)
    assert torch.equal(SelfAttention(8)(x), x)


def test_heads_and_groups_of_the_default_levels():
    """Checkpoints do not hold them."""
    assert [SelfAttention(channels).num_heads for channels in (64, 128, 256)] == [1, 2, 4]
    assert [group_norm(channels).num_groups for channels in (64, 128, 256)] == [16, 32, 32]


def wired(model, x_t, timesteps, labels, mult, blocks):
    """UNet.forward from its parts' weights, patches by plain sums, without its own trunk."""
    p, basis = model.patch_size, model.basis
    w = dict(model.named_parameters())
    h = timestep_embedding(timesteps, 16)
    h = F.silu(F.linear(h, w["time_mlp.0.weight"], w["time_mlp.0.bias"]))
    time = F.silu(F.linear(h, w["time_mlp.2.weight"], w["time_mlp.2.bias"]))
    cond = F.silu(torch.cat([time, w["class_embedding.weight"][labels]], dim=1))
    B, C, H, W = x_t.shape
    pixels = x_t.view(B, C, H // p, p, W // p, p)
    abar = CosineNoiseScheduler(50).alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    patches = torch.einsum("bchiwj,kcij->bkhw", pixels, basis)
    patches = patches / (abar * model.patch_std**2 + 1 - abar).sqrt()

    h, skips = F.conv2d(patches, w["stem.weight"], w["stem.bias"], padding=1) + w["position"], []
    for level in range(len(mult)):
        if level:
            h = h.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
        for block in range(blocks[level]):
            stage = model.down[level][block]
            h = stage.attention(stage.res(h, cond))
            skips.append(h)
    for stage in (model.middle[0], model.middle[1]):
        h = stage.attention(stage.res(h, cond))
    for index in range(len(mult)):
        if index:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        for stage in model.up[index]:
            h = torch.cat([h, skips.pop()], dim=1)
            h = stage.attention(stage.res(h, cond))
    h = F.group_norm(h, model.out_norm.num_groups, w["out_norm.weight"], w["out_norm.bias"])
    rest = F.conv2d(F.silu(h), w["out.weight"], w["out.bias"], padding=1)
    kernels = F.linear(time, w["input_filter.weight"], w["input_filter.bias"]).view(B, -1, 25, 1)
    around = F.unfold(patches, 5, padding=2).view(B, patches.shape[1], 25, -1)
    rest = rest + (kernels * around).sum(2).view_as(patches)
    rest = torch.einsum("bkhw,kcij->bchiwj", rest, basis).reshape(x_t.shape)
    return model.wiener(x_t, timesteps, rest)


def test_the_network_is_wired_as_checkpoints_expect(awake_model):
    """Changes of the wiring keep every name and shape: checkpoints would load and draw worse."""
    model = awake_model(num_res_blocks=(2, 1)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # also the norms, which start as ones and zeros
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.measure(0.3 * torch.randn(20, 3, 16, 16, generator=generator) + 0.2)
    x_t = torch.randn(3, 3, 16, 16, generator=generator)
    timesteps, labels = torch.tensor([0, 20, 49]), torch.tensor([0, 7, 10])
    with torch.no_grad():
        expected = wired(model, x_t, timesteps, labels, (1, 2), (2, 1))
        assert_close(model(x_t, timesteps, labels), expected, rtol=1e-4, atol=1e-4)
