"""Muon: orthogonalisation against singular value decompositions, steps against closed forms."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from conditional_diffusion import muon
from conditional_diffusion.muon import QUINTICS, Muon, matrix_weights, orthogonalised


def random_matrices(*shape: int, condition: float = 1e3, seed: int = 0) -> torch.Tensor:
    """float64 matrices (n, rows, columns) whose singular values fall from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(
        torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    exponents = torch.linspace(0, -math.log10(condition), min(shape[1:]), dtype=torch.float64)
    return (u * 10**exponents) @ v


def by_decomposition(matrices: torch.Tensor) -> torch.Tensor:
    """What the quintics make of each singular value over the root of |X X^T|, in float64."""
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.pow(4).sum(-1, keepdim=True) ** 0.25
    for a, b, c in QUINTICS:
        s = a * s + b * s**3 + c * s**5
    return (u * s[:, None]) @ v


def test_each_quintic_is_the_best_there_is_for_what_the_one_before_leaves():
    """Of three terms it is best if and only if its largest error has alternating signs four times.

    That is Chebyshev's theorem.
    """
    low, high = 0.003, 1.0
    for a, b, c in QUINTICS:
        s = torch.linspace(low, high, 100_001, dtype=torch.float64)
        error = a * s + b * s**3 + c * s**5 - 1
        largest = error.abs().max().item()
        signs = error[error.abs() > 0.99 * largest].sign()
        assert signs.diff().count_nonzero() == 3, (a, b, c)
        low, high = 1 - largest, 1 + largest
    assert low > 0.80 and high < 1.20


def test_stacks_of_all_shapes_are_orthogonalised_together():
    shapes = [(3, 8, 40), (2, 40, 8), (1, 8, 8), (2, 24, 100), (1, 1, 5), (1, 5, 1)]
    stacks = [random_matrices(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    for scale in (1e-5, 1.0, 1e8):
        results = orthogonalised([(scale * stack).float() for stack in stacks])
        for result, stack in zip(results, stacks, strict=True):
            assert result.dtype == torch.float32
            # X X^T, in float32, has lost what is below 1e-7 of its trace.
            assert_close(result.double(), by_decomposition(stack), rtol=0, atol=1e-3)


def test_singular_values_come_near_one():
    (result,) = orthogonalised([torch.randn(2, 64, 128, generator=torch.manual_seed(0))])
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.80 and values.max() < 1.20


def test_of_nothing_comes_nothing():
    stack = torch.zeros(2, 4, 6)
    stack[1] = 1e-20
    (result,) = orthogonalised([stack])
    assert result.abs().max() < 1e-6 and torch.isfinite(result).all()


def stepped(parameter: nn.Parameter, gradients: list, **options) -> tuple[torch.Tensor, Muon]:
    optimizer = Muon([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype).clone(memory_format=torch.preserve_format)
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_steps_of_a_convolution_are_the_formula(layout):
    """Nesterov momentum 0.95, decoupled decay, steps of half a learning rate in the mean."""
    gradients = [random_matrices(1, 12, 4 * 9, seed=seed).view(12, 4, 3, 3) for seed in (1, 2)]
    start = random_matrices(1, 12, 4 * 9, seed=3).view(12, 4, 3, 3)
    lr, decay = 0.1, 0.3
    expected, momentum = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        ahead = (gradient + 0.95 * momentum).reshape(1, 12, 36)
        update = 0.5 * math.sqrt(36) * by_decomposition(ahead).view(12, 4, 3, 3)
        expected = (1 - lr * decay) * expected - lr * update
    parameter = nn.Parameter(start.float().to(memory_format=layout))
    gradients = [gradient.to(memory_format=layout) for gradient in gradients]
    found, _ = stepped(parameter, gradients, lr=lr, weight_decay=decay)
    assert found.is_contiguous(memory_format=layout)
    assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_weights_side_by_side_are_those_of_steps_one_by_one():
    shapes = [(6, 4, 3, 3), (6, 4, 3, 3), (12, 4), (4, 12), (12, 4), (6, 36), (36, 1, 2, 3)]
    starts = [torch.randn(shape, generator=torch.manual_seed(i)) for i, shape in enumerate(shapes)]
    starts[1] = starts[1].to(memory_format=torch.channels_last)
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(2)]
    together = [nn.Parameter(start.clone()) for start in starts]
    optimizer = Muon(together, lr=0.1, weight_decay=0.2)
    for each in gradients:
        for parameter, gradient in zip(together, each):
            parameter.grad = gradient.clone()
        optimizer.step()
    for index, start in enumerate(starts):
        own = [each[index] for each in gradients]
        alone, _ = stepped(nn.Parameter(start.clone()), own, lr=0.1, weight_decay=0.2)
        assert_close(together[index].detach(), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_steps_are_those_of_torch(shape, monkeypatch):
    """Which computes in bfloat16, so only nearly, and with 0.2 where ours has 0.5.

    Both follow the quintic that goes to one (Newton-Schulz), because torch's takes one for all.
    """
    quintic, times = (15 / 8, -5 / 4, 3 / 8), 12
    monkeypatch.setattr(muon, "QUINTICS", (quintic,) * times)
    gradients = [random_matrices(1, *shape, condition=10, seed=s)[0].float() for s in range(5)]
    ours = stepped(nn.Parameter(torch.zeros(shape)), gradients, lr=0.02)[0]
    theirs = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon(
        [theirs], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw",
        ns_coefficients=quintic, ns_steps=times,
    )
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_a_step_that_is_not_finite_leaves_everything():
    shape = (4, 6)
    gradients = [random_matrices(1, *shape, seed=seed)[0] for seed in (1, 2)]
    start = random_matrices(1, *shape, seed=3)[0].float()
    parameter, optimizer = stepped(nn.Parameter(start.clone()), gradients[:1], lr=0.1)
    before, momentum = parameter.clone(), optimizer.state_dict()["state"][0]["momentum"].clone()
    (weight,) = optimizer.param_groups[0]["params"]
    for poison in (math.nan, math.inf):
        weight.grad = torch.full(shape, poison)
        optimizer.found_inf = torch.ones(())
        optimizer.param_groups[0]["weight_decay"] = 0.5
        optimizer.step()
        assert torch.equal(weight, before)
        assert torch.equal(optimizer.state_dict()["state"][0]["momentum"], momentum)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.found_inf = torch.zeros(())
    weight.grad = gradients[1].float()
    optimizer.step()
    whole, _ = stepped(nn.Parameter(start.clone()), gradients, lr=0.1)
    assert torch.equal(weight, whole)


def test_weights_without_a_gradient_stay():
    weights = [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.5)
    optimizer.step()
    weights[0].grad = torch.eye(4, 6)
    optimizer.step()
    assert not torch.equal(weights[0], torch.ones(4, 6))
    assert torch.equal(weights[1], torch.ones(4, 6))


def test_updates_have_one_size_whatever_the_shape():
    for shape in [(8, 8), (64, 8), (8, 512), (32, 4, 3, 3), (64, 2, 3, 3)]:
        gradient = torch.randn(shape, generator=torch.manual_seed(0))
        update, _ = stepped(nn.Parameter(torch.zeros(shape)), [gradient], lr=1.0)
        # Half, times the singular values' 0.80 to 1.20.
        assert 0.40 < update.square().mean().sqrt() < 0.60


def test_it_is_for_the_weights_of_linear_layers_and_convolutions(tiny_model):
    model = tiny_model()
    chosen = {id(weight) for weight in matrix_weights(model)}
    names = {name for name, weight in model.named_parameters() if id(weight) in chosen}
    others = {name for name, _ in model.named_parameters()} - names
    assert {"position", "class_embedding.weight"} <= others
    assert all(name.endswith("weight") for name in names)
    rest = others - {"position", "class_embedding.weight"}
    assert all(name.endswith("bias") or "norm" in name for name in rest), rest
