"""Forms of common layers that cost less than PyTorch's own on a CPU and give the same numbers up to rounding.

`accelerate` gives them to a network where its layers are what the forms compute, and leaves all others alone.

Beside its convolutions a CPU spends its time on moving memory. Three things waste it: PyTorch's batch norm
vectorises over channels, of which full resolution has fewer than a register holds; the gradient of a bias that batch
norm cancels anyway costs oneDNN more than the rest of a transposed convolution; and the gradients of
a 1x1x1 convolution of few channels take four to fifteen times as long as those of a product of matrices.

Half of what a training step keeps for its backward pass are outputs of ReLUs, which a batch norm can give again from
its input; `recompute` keeps the inputs alone.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

COLUMNS = 4096  # sums that run side by side in batch norm: the more, the fewer roundings add up in each
MOST_CHANNELS = 512  # a layer of more has so few voxels that PyTorch's own batch norm is exact
LANES = 8  # of which the number of channels must be a multiple


def accelerate(network: nn.Module, recompute: bool = False) -> None:
    """Let a network's sequences and 1x1x1 convolutions take the faster forms, in place; names and weights stay.

    Whether layers are what a form computes is asked at each call: a hook, another activation or dilation has its
    effect whenever it comes in.

    Args:
        recompute: in training, compute the outputs of batch norm and ReLU again for the backward pass instead of
            keeping them: the same numbers with less memory.
    """
    weights = [weight for weight in network.parameters() if weight.dim() == 5 and not weight.is_contiguous()]
    channels_last = any(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)
    for module in network.modules():
        if type(module) in (nn.Sequential, Layers):
            module.__class__ = Layers
            module.recompute, module.channels_last = recompute, channels_last
        elif type(module) is nn.Conv3d and module.kernel_size == (1, 1, 1):
            module.__class__ = Pointwise


class Layers(nn.Sequential):
    """Its modules one after the other; a convolution with its batch norm and ReLU in one."""

    recompute = channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        volumes = x.dim() == 5
        if self.channels_last and volumes and x.shape[1] == 1:
            x = _laid_out(x)
        layers = list(self)
        while layers:
            if volumes and _fuses(*layers[:3]):
                x = conv_norm_relu(layers[0], layers[1], x, self.recompute and torch.is_grad_enabled())
                del layers[:3]
            else:
                x = layers.pop(0)(x)
        return x


def _fuses(conv: nn.Module, norm: nn.Module | None = None, relu: nn.Module | None = None) -> bool:
    """Whether `conv_norm_relu` computes what three layers do."""
    return (
        _is_just(relu, nn.ReLU)
        and _is_just(norm, nn.BatchNorm3d)
        and _is_just(conv, nn.Conv3d, nn.ConvTranspose3d)
        and (conv.dilation, conv.output_padding) == ((1, 1, 1), (0, 0, 0))
        and (conv.groups, conv.padding_mode, type(conv.padding)) == (1, "zeros", tuple)
        and conv.bias is not None
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype == torch.float32
    )


def _is_just(module: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes, not of a subclass, and nobody listens to it or has changed it."""
    if type(module) not in kinds or "forward" in vars(module):
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks)


def _laid_out(image: Tensor) -> Tensor:
    """An image of one channel, channels last: such a tensor fits both formats, and PyTorch takes it for contiguous
    unless its strides say otherwise; the whole first level would then be contiguous."""
    return image.squeeze(1).contiguous().unsqueeze(-1).movedim(-1, 1)


def conv_norm_relu(conv: nn.Module, norm: nn.BatchNorm3d, x: Tensor, recompute: bool = False) -> Tensor:
    """Convolution (plain or transposed), batch norm, ReLU; running statistics are updated as by the norm itself."""
    convolve = F.conv_transpose3d if isinstance(conv, nn.ConvTranspose3d) else F.conv3d
    if not norm.training and not torch.is_grad_enabled():
        weight, bias = _with_norm(conv, norm)
        return F.relu(convolve(x, weight, bias, stride=conv.stride, padding=conv.padding), inplace=True)
    fused = x.device.type == "cpu" or recompute  # a compiler fuses by itself
    if not (norm.training and fused) or torch.compiler.is_compiling():
        return F.relu(norm(conv(x)), inplace=True)
    with _forgotten(x):
        x = convolve(x, conv.weight, stride=conv.stride, padding=conv.padding)
    norm.num_batches_tracked.add_(1)
    statistics = norm.running_mean, norm.running_var, norm.momentum, norm.eps
    return _BatchNormReLU.apply(x, conv.bias, norm.weight, norm.bias, *statistics, recompute)


def _with_norm(conv: nn.Module, norm: nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that convolution and norm are in evaluation."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    channels = 1 if isinstance(conv, nn.ConvTranspose3d) else 0  # the axis of the output's channels
    shape = [-1 if axis == channels else 1 for axis in range(5)]
    return conv.weight * scale.view(shape), (conv.bias - norm.running_mean) * scale + norm.bias


class _BatchNormReLU(torch.autograd.Function):
    """ReLU(batch norm(x + offset)) with batch statistics.

    They take out what all voxels of a channel have in common, so the offset, the bias of a convolution, only moves
    the running mean; its gradient is 0.
    """

    @staticmethod
    def forward(ctx, x, offset, weight, bias, running_mean, running_var, momentum, eps, recompute):
        form = _folded_norm if _folds(x) else _plain_norm
        out, mean, inverse_sd, variance = form(x, weight, bias, eps)
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean + offset, momentum)
        running_var.lerp_(variance * (count / (count - 1)), momentum)
        out = out.relu_()
        ctx.save_for_backward(x, weight, bias, mean, inverse_sd, variance, None if recompute else out)
        ctx.eps, ctx.recompute, ctx.again = eps, recompute, None
        return out

    @staticmethod
    @once_differentiable  # a penalty on gradients would otherwise go wrong in silence
    def backward(ctx, grad):
        x, weight, _, mean, inverse_sd, *_ = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, _output(ctx), 0)
        ctx.again = None  # whatever else wanted the output came before
        form = _folded_norm_backward if _folds(x) else _plain_norm_backward
        grad_x, grad_weight, grad_bias = form(grad, x, weight, mean, inverse_sd, ctx.eps)
        return grad_x, torch.zeros_like(grad_bias), grad_weight, grad_bias, *[None] * 5


def _output(node, keep: bool = False) -> Tensor:
    """Output of a `_BatchNormReLU` from its node of the graph, computed again where it was not kept.

    Args: keep, hold on to it until the backward pass of the node itself, which is to come next.
    """
    x, weight, bias, mean, _, variance, out = node.saved_tensors
    out = node.again if out is None else out
    if out is None:
        with torch.no_grad():
            if _folds(x):
                norm = _scaled(x, weight, bias, mean, variance, node.eps)
            else:
                norm, *_ = _plain_norm(x, weight, bias, node.eps)
            out = norm.relu_()
        node.again = out if keep else None
    return out


def _forgotten(x: Tensor) -> AbstractContextManager:
    """Within it, x is not kept for the backward pass where it can be computed again."""
    nodes = [] if torch.compiler.is_compiling() else _origins(x)
    if not nodes:
        return contextlib.nullcontext()
    address = x.data_ptr()  # the graph holds the functions below, so they must not hold x

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        return (kept.size(), kept.stride()) if kept.data_ptr() == address else kept  # x or another view of it

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        # An output that a sum needs would lie about until its own node is reached, far below: it is made twice.
        outputs = [_output(node, keep=len(nodes) == 1) for node in nodes]
        return sum(outputs[1:], outputs[0]).as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _origins(x: Tensor) -> list[Any]:
    """The nodes of the graph from whose outputs x, one of them or their sum, can be computed again; none if it cannot.

    The sum is that of a skip connection.
    """
    node, nodes = x.grad_fn, [x.grad_fn]
    if type(node).__name__ == "AddBackward0" and node._saved_alpha == 1:
        nodes = [source for source, _ in node.next_functions]
    known = all(getattr(node, "recompute", False) and node.saved_tensors[0].shape == x.shape for node in nodes)
    return nodes if known else []


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Returns: the normalised x; mean, 1 / sd and variance of each channel."""
    out, mean, inverse_sd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return out, mean, inverse_sd, inverse_sd.square().reciprocal() - eps


def _plain_norm_backward(grad, x, weight, mean, inverse_sd, eps) -> tuple[Tensor, ...]:
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse_sd, True, eps, [True, True, True]
    )


def _voxels_per_row(x: Tensor) -> int:
    """Voxels that stand side by side in a row of the folded matrix: as many as divide all of them and fit COLUMNS."""
    most = 1 << (COLUMNS // x.shape[1]).bit_length() - 1  # a power of two
    return math.gcd(x.numel() // x.shape[1], most)


def _folds(x: Tensor) -> bool:
    """Whether batch norm goes over the folded matrix."""
    channels = x.shape[1]
    if x.device.type != "cpu" or channels > MOST_CHANNELS or channels % LANES:
        return False
    return x.is_contiguous(memory_format=torch.channels_last_3d) and _voxels_per_row(x) > 1


def _fold(x: Tensor) -> Tensor:
    """(B, C, W, H, D), channels last, as a matrix of up to COLUMNS columns: each row several voxels."""
    return x.permute(0, 2, 3, 4, 1).reshape(-1, x.shape[1] * _voxels_per_row(x))


def _unfold(rows: Tensor, like: Tensor) -> Tensor:
    batch, channels, *size = like.shape
    return rows.view(batch, *size, channels).permute(0, 4, 1, 2, 3)


def _per_column(x: Tensor, *values: Tensor) -> list[Tensor]:
    """Values of the channels, for every column of the folded x."""
    return [value.repeat(_voxels_per_row(x)) for value in values]


def _scaled(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """(x - mean) / sd * weight + bias, by PyTorch's kernel for evaluation on the folded matrix."""
    columns = _per_column(x, weight, bias, mean, variance)
    return _unfold(torch.native_batch_norm(_fold(x), *columns, False, 0.0, eps)[0], x)


def _folded_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """As `_plain_norm`: statistics of the columns first, then of the channels."""
    rows = _fold(x)
    columns = torch.batch_norm_update_stats(rows, torch.zeros(rows.shape[1]), torch.ones(rows.shape[1]), 0.0)
    means, variances = (values.double().view(-1, x.shape[1]) for values in columns)
    mean = means.mean(dim=0)
    variance = (variances.mean(dim=0) + (means - mean).square().mean(dim=0)).float()
    mean = mean.float()
    return _scaled(x, weight, bias, mean, variance, eps), mean, (variance + eps).rsqrt(), variance


def _folded_norm_backward(grad, x, weight, mean, inverse_sd, eps) -> tuple[Tensor, ...]:
    variance = inverse_sd.square().reciprocal() - eps
    # With the statistics held fixed PyTorch gives weight / sd * grad, and the sums of each column.
    grad_x, *sums = torch.ops.aten.native_batch_norm_backward(
        _fold(grad), _fold(x), *_per_column(x, weight, mean, variance), None, None, False, eps, [True, True, True]
    )
    grad_weight, grad_bias = (values.double().view(-1, x.shape[1]).sum(dim=0).float() for values in sums)
    # What is left comes through the statistics; it is linear in the normalised x.
    scale = -weight * inverse_sd * (x.shape[1] / x.numel())
    through = _scaled(x, scale * grad_weight, scale * grad_bias, mean, variance, eps)
    return _unfold(grad_x, x).add_(through), grad_weight, grad_bias


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution; with channels last, where voxels are the rows of a matrix, as one product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        plain = (self.stride, self.padding, self.groups) == ((1, 1, 1), (0, 0, 0), 1)
        rounds = x.is_cuda and torch.backends.cudnn.allow_tf32  # heads stay float32 where --tf32 is given
        if not plain or not (rounds or x.is_contiguous(memory_format=torch.channels_last_3d)):
            return super().forward(x)
        with _forgotten(x):
            return F.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)
