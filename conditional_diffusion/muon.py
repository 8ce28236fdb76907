"""Muon: momentum, orthogonalised matrix by matrix before it becomes a step (Jordan 2024).

https://kellerjordan.github.io/posts/muon/. torch.optim.Muon takes two-dimensional parameters only,
works through them one by one and cannot leave out a step without waiting for the device.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Odd quintics a s + b s^3 + c s^5, each the best approximation of one on what those before it make
# of [0.003, 1] (Amsel et al. 2025, "The Polar Express", alg. 1); together within 0.20 of one. Three
# are enough for narrow networks, but not for the default one.
QUINTICS = (
    (8.38367, -24.76591, 18.35708), (4.04342, -3.01140, 0.56951),
    (3.50557, -2.62665, 0.52572), (2.49012, -1.83428, 0.43683),
)
UPDATE_RMS = 0.5  # root mean square of an update, in learning rates (Liu et al. 2025: 0.2)
NO_POWER = 1e-14  # gram matrices of a smaller norm are not scaled up


def matrix_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of its linear layers and convolutions: what Muon is for."""
    return [
        module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]


def polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a I + b G + c G^2 for matrices G (n, r, r)."""
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result


def orthogonal_factors(gram: Tensor) -> Tensor:
    """Q (n, r, r) for gram matrices X X^T (n, r, r): Q X has singular values near one.

    A quintic a X + b (X X^T) X + c (X X^T)^2 X multiplies X from the left alone, by a polynomial of
    X X^T, and such polynomials commute. So they can be followed on matrices of r rows and columns,
    however many columns X has. The root of their norm bounds the largest singular value of X, and
    more closely than the norm of X would.
    """
    norm = torch.linalg.matrix_norm(gram, keepdim=True).clamp(min=NO_POWER)
    gram = gram / norm
    multiplier = factors = polynomial(gram, *QUINTICS[0])
    for quintic in QUINTICS[1:]:
        gram = torch.bmm(torch.bmm(multiplier, gram), multiplier)
        multiplier = polynomial(gram, *quintic)
        factors = torch.bmm(multiplier, factors)
    return factors * norm.rsqrt()


def orthogonalised(stacks: list[Tensor], scale: Tensor | float = 1.0) -> list[Tensor]:
    """Each matrix X = U S V^T of float32 stacks (n, rows, columns) as scale U S' V^T, S' near one.

    S' lies between 0.80 and 1.20, but for singular values below 0.003 of the root of the norm of
    X X^T, which come out smaller.
    """
    wide = [stack if stack.shape[1] <= stack.shape[2] else stack.mT for stack in stacks]
    by_rows: dict[int, list[int]] = {}
    for index, stack in enumerate(wide):
        by_rows.setdefault(stack.shape[1], []).append(index)
    results = list(stacks)
    for indices in by_rows.values():
        grams = [torch.bmm(wide[index], wide[index].mT) for index in indices]
        factors = scale * orthogonal_factors(torch.cat(grams))
        for index, factor in zip(indices, factors.split([len(gram) for gram in grams])):
            result = torch.bmm(factor, wide[index])
            results[index] = result if wide[index] is stacks[index] else result.mT
    return results


def in_order_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of the parameter's shape as a vector, in the order of the parameter's memory."""
    return (tensor if parameter.is_contiguous() else tensor.permute(0, 2, 3, 1)).reshape(-1)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    A parameter of more than two dimensions, contiguous or channels_last, counts as a matrix of its
    outputs by all else. Updates are scaled to one root mean square, UPDATE_RMS learning rates,
    whatever the matrix's shape, so that AdamW and Muon share a learning rate (Liu et al. 2025, sec.
    2.2), a number or a tensor without dimensions. Steps are left out where `found_inf` is not zero,
    as by torch's fused AdamW. Products stay in float32: in bfloat16 the gram matrix of a nearly
    singular one is no longer positive.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: Tensor | float,
                 weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum
        self.found_inf = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if weights := [weight for weight in group["params"] if weight.grad is not None]:
                self._step(weights, group["lr"], group["weight_decay"])

    def _step(self, parameters: list[nn.Parameter], lr: Tensor | float,
              weight_decay: float) -> None:
        finite = self.found_inf == 0
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault((len(parameter), parameter.numel()), []).append(parameter)
        parameters = [parameter for alike in by_shape.values() for parameter in alike]
        # All of them end to end, because many small operations keep a GPU waiting. The columns of a
        # matrix may stand in any order.
        ahead = self._look_ahead(parameters, finite)
        sizes = [numel * len(alike) for (_, numel), alike in by_shape.items()]
        stacks = [part.view(-1, rows, numel // rows)
                  for part, (rows, numel) in zip(ahead.split(sizes), by_shape)]
        updates = orthogonalised(stacks, lr)  # (n, rows, columns) each
        if weight_decay > 0:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay * finite)
        for alike, update in zip(by_shape.values(), updates):
            # An orthogonal matrix has a root mean square of one by the root of its longer side.
            length = UPDATE_RMS * math.sqrt(max(update.shape[1:]))
            weights = [in_order_of(parameter, parameter) for parameter in alike]
            torch._foreach_sub_(weights, list(update.flatten(1)), alpha=length)

    def _look_ahead(self, parameters: list[nn.Parameter], finite: Tensor) -> Tensor:
        """Nesterov's look ahead of all parameters, a vector; momentum updated.

        Where gradients are not finite, momentum stays and the vector is zero, and so is the update.
        """
        momenta = [in_order_of(parameter, self.state[parameter]["momentum"])
                   for parameter in parameters]
        gradient = torch.cat([in_order_of(parameter, parameter.grad) for parameter in parameters])
        momentum = torch.cat(momenta)
        gradient.masked_fill_(~finite, 0.0)
        momentum.lerp_(gradient, (1 - self.momentum) * finite)
        torch._foreach_copy_(momenta, momentum.split([len(vector) for vector in momenta]))
        return gradient.lerp_(momentum, self.momentum * finite)
