"""The paper's networks: a ResNet for small images and a multi-layer perceptron.

Both are Flax Linen modules without state: `module.apply` maps variables and images to logits.
Their top-level submodules are named `module_1 .. module_k`, the modules of the paper's figure 6,
in `params` and in `batch_stats` alike, so that a reset mask can address them.

Layers, initialisation and normalisation follow PyTorch, not Flax, wherever the two differ. Names
of axes: B examples, H height, W width, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from plastic_jax.config import COMPUTE_DTYPES, INITIALISATIONS, MODELS, NORMS
from plastic_jax.errors import InputError
from plastic_jax.kernels import convolution as convolutions
from plastic_jax.kernels import linear

Variables = dict[str, Any]
"""`{'params': ..., 'batch_stats': ...}`, nested plain dicts of arrays."""

_DRAWN_BY_INIT = nn.initializers.zeros_init()
_BLOCK_MODULES = 4  # the modules of basic blocks, with w, 2w, 4w and 8w channels
_EPSILON = 1e-5  # PyTorch's, for all three of its norms
_MOMENTUM = 0.9  # share of the old running statistics that is kept; PyTorch calls it 0.1


def build(
    model: str,
    *,
    width: int,
    depth: int,
    norm: str,
    initialisation: str,
    compute_dtype: str,
    classes: int,
    convolution: str = "plain",
) -> nn.Module:
    """The network, not yet initialised.

    `module.apply({'params': ..., 'batch_stats': ...}, images_BHWC, train=...)` gives logits
    [B, classes], float32 (float64 where `compute_dtype` is); with `train=True` pass
    `mutable=['batch_stats']` and get `(logits, {'batch_stats': ...})`. `apply` in this file does
    both.

    Args:
      model: one of `MODELS`. `resnet`: 3x3 stem with stride 1 and no pooling, four modules of
        `depth` basic blocks with w, 2w, 4w, 8w channels, the last three starting with stride 2,
        global average pool, linear head; ResNet-18 is width 64, depth 2. `mlp`: `depth` hidden
        layers (linear, norm, ReLU) of `width` units and a linear head.
      width: channels of the stem (w), or units of a hidden layer.
      depth: basic blocks in each of the four modules (d), or hidden layers.
      norm: one of `NORMS`. `batch` normalises each channel over the batch and, for evaluation,
        by running statistics; `layer` each example over all its values, as PyTorch's
        `LayerNorm(width)` in an MLP and `GroupNorm(1, channels)` in a ResNet. Only with `none`
        do convolutions have a bias.
      initialisation: one of `INITIALISATIONS`. `pytorch`: weights and biases uniform within
        1 / sqrt(fan_in), its default (kaiming uniform with a = sqrt(5)); `he` and `lecun`: normal,
        cut off at two standard deviations, with variance 2 / fan_in and 1 / fan_in, and zero
        biases.
      compute_dtype: one of `COMPUTE_DTYPES`. Parameters, statistics and logits are float32, with
        `float64` all of it float64 (for verification; needs `jax_enable_x64`).
      classes: number of logits.
      convolution: one of `plastic_jax.kernels.convolution.FORMULATIONS`; an MLP's hidden layers are `native`, or XLA's.

    Raises:
      InputError: for a name that is none of the above.
    """
    for field, value, allowed in (
        ("model", model, MODELS),
        ("norm", norm, NORMS),
        ("initialisation", initialisation, INITIALISATIONS),
        ("compute_dtype", compute_dtype, COMPUTE_DTYPES),
        ("convolution", convolution, convolutions.FORMULATIONS),
    ):
        if value not in allowed:
            raise InputError(f"{field} is {value!r}; it must be one of {', '.join(allowed)}.")
    if model == "mlp":
        return Mlp(width, depth, norm, initialisation, compute_dtype, classes, convolution)
    return ResNet(width, depth, norm, initialisation, compute_dtype, classes, convolution)


def modules(model: str, depth: int) -> int:
    """How many modules a reset mask can address: 6 in a ResNet, depth + 1 in an MLP (figure 6)."""
    return depth + 1 if model == "mlp" else _BLOCK_MODULES + 2


def init(module: nn.Module, key: Array, shape_HWC: tuple[int, int, int]) -> Variables:
    """Draws the network's variables (Flax's own `module.init` gives zeros for all that is drawn).

    All random numbers are one draw in float32, cut up in the order of the parameters' names and
    then cast. So a float64 network starts from the float32 network's values, bit for bit, and
    the draw compiles in a fraction of a second, where one for each parameter takes half a minute
    for a ResNet on a CPU.

    Args:
      module: from `build`.
      key: a PRNG key; under `vmap` one for each trial.
      shape_HWC: shape of one image.

    Returns:
      `{'params': ..., 'batch_stats': ...}`; `batch_stats` is empty without BatchNorm. Norms start
      with scale 1 and bias 0, running statistics with mean 0 and variance 1.
    """
    image = jnp.zeros((1, *shape_HWC), jnp.float32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, train=False))
    leaves = cast(dict[tuple[str, ...], jax.ShapeDtypeStruct], flatten_dict(shapes["params"]))
    fans_in = {}
    for path, leaf in leaves.items():
        *layer, name = path
        if name == "kernel":
            fans_in[path] = math.prod(leaf.shape[:-1])
        elif module.initialisation == "pytorch" and (kernel := leaves.get((*layer, "kernel"))):
            fans_in[path] = math.prod(kernel.shape[:-1])
    variance = {"pytorch": 1 / 3, "he": 2.0, "lecun": 1.0}[module.initialisation]  # times fan_in
    drawn = _unit_variance(module.initialisation, key, sum(leaves[path].size for path in fans_in))

    params, start = {}, 0
    for path in sorted(leaves):
        leaf = leaves[path]
        if path in fans_in:
            values = drawn[start : start + leaf.size].reshape(leaf.shape)
            params[path] = ((variance / fans_in[path]) ** 0.5 * values).astype(leaf.dtype)
            start += leaf.size
        else:
            params[path] = _constant(path, leaf)
    batch_stats = jax.tree.map_with_path(
        lambda path, leaf: _constant([entry.key for entry in path], leaf),
        shapes.get("batch_stats", {}),
    )
    return {"params": unflatten_dict(params), "batch_stats": batch_stats}


def apply(module: nn.Module, variables: Variables, images_BHWC: Array, *, train: bool) -> tuple[Array, Any]:
    """Logits and new running statistics.

    Args:
      module: from `build`.
      variables: as from `init`.
      images_BHWC: floating point, already normalised.
      train: whether BatchNorm uses the batch's statistics (and updates the running ones) or the
        running ones.

    Returns:
      Logits [B, classes], and `batch_stats` with the structure it has in `variables`, unchanged
      in evaluation.
    """
    logits: Any
    if not train:
        logits = module.apply(variables, images_BHWC, train=False)
        return logits, variables["batch_stats"]
    logits, updated = module.apply(variables, images_BHWC, train=True, mutable=["batch_stats"])
    return logits, updated["batch_stats"]


def parameters_count(
    model: str,
    *,
    width: int,
    depth: int,
    norm: str,
    classes: int,
    shape_HWC: tuple[int, int, int],
) -> int:
    """Number of parameters, in closed form; the arguments are those of `build` and `init`.

    11 173 962 for a ResNet with width 64, depth 2, BatchNorm, 10 classes and 3 channels.
    """
    height, image_width, channels = shape_HWC
    if model == "mlp":
        per_unit = 1 + (0 if norm == "none" else 2)
        inputs = height * image_width * channels
        hidden = width * (inputs + per_unit) + (depth - 1) * width * (width + per_unit)
        return hidden + (width + 1) * classes
    per_channel = 1 if norm == "none" else 2
    total = width * (9 * channels + per_channel)
    fan_in = width
    for stage in range(_BLOCK_MODULES):
        out = width * 2**stage
        total += out * (9 * fan_in + per_channel) + (2 * depth - 1) * out * (9 * out + per_channel)
        if stage > 0:
            total += out * (fan_in + per_channel)
        fan_in = out
    return total + (fan_in + 1) * classes


class Mlp(nn.Module):
    """Hidden layers `module_1 .. module_depth`, head `module_{depth + 1}`; fields as in `build`."""

    width: int
    depth: int
    norm: str
    initialisation: str
    compute_dtype: str
    classes: int
    convolution: str = "plain"

    @nn.compact
    def __call__(self, images_BHWC: Array, *, train: bool) -> Array:
        """Logits [B, classes]."""
        dtype, _ = _dtypes(self.compute_dtype)
        x = images_BHWC.reshape(images_BHWC.shape[0], -1).astype(dtype)
        for layer in range(1, self.depth + 1):
            x = _Hidden(
                self.width,
                self.norm,
                self.compute_dtype,
                self.convolution,
                name=f"module_{layer}",
            )(x, train=train)
        return _head(self, f"module_{self.depth + 1}", x)


class ResNet(nn.Module):
    """Stem `module_1`, basic blocks `module_2 .. module_5`, head `module_6`; fields as in `build`."""

    width: int
    depth: int
    norm: str
    initialisation: str
    compute_dtype: str
    classes: int
    convolution: str = "plain"

    @nn.compact
    def __call__(self, images_BHWC: Array, *, train: bool) -> Array:
        """Logits [B, classes]."""
        dtype, state_dtype = _dtypes(self.compute_dtype)
        common = (self.norm, self.compute_dtype, self.convolution)
        x = _Stem(self.width, *common, name="module_1")(images_BHWC.astype(dtype), train=train)
        for stage in range(_BLOCK_MODULES):
            x = _Blocks(
                self.width * 2**stage,
                *common,
                depth=self.depth,
                stride=1 if stage == 0 else 2,
                name=f"module_{stage + 2}",
            )(x, train=train)
        pooled_BC = x.astype(state_dtype).mean((1, 2))
        return _head(self, f"module_{_BLOCK_MODULES + 2}", pooled_BC)


class _Hidden(nn.Module):
    """Linear, norm, ReLU: [B, inputs] -> [B, width]."""

    width: int
    norm: str
    compute_dtype: str
    convolution: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        dtype, state_dtype = _dtypes(self.compute_dtype)
        x = nn.Dense(
            self.width,
            dtype=dtype,
            param_dtype=state_dtype,
            kernel_init=_DRAWN_BY_INIT,
            dot_general=linear.dot(self.convolution),
            name="linear",
        )(x)
        return nn.relu(_normalise(self.norm, self.compute_dtype, "norm", x, train))


class _ConvolutionalModule(nn.Module):
    """What the convolutional modules share; x is [B, H, W, C] -> [B, H', W', width]."""

    width: int
    norm: str
    compute_dtype: str
    convolution: str

    def _fused(self, train: bool) -> bool:
        """Whether units are computed in one go: in training with BatchNorm, as its statistics are of a batch."""
        return train and self.norm == "batch" and self.convolution == "native" and self.compute_dtype != "bfloat16"

    def _unit(self, name: str, x: Array, norm_3C: Array | None, taps: int, stride: int) -> tuple[Array, Array]:
        """Convolution `conv{name}` of what comes out of a norm and a ReLU, and norm `norm{name}`, yet to be applied."""
        _, state_dtype = _dtypes(self.compute_dtype)
        kernel = _Kernel((taps, taps, x.shape[-1], self.width), state_dtype, name=f"conv{name}")()
        x, statistics = convolutions.unit(x, kernel, norm_3C, stride)
        return x, BatchNorm(self.compute_dtype, name=f"norm{name}")(x, train=True, statistics=statistics)

    def _convolve(self, name: str, x: Array, taps: int, stride: int, train: bool) -> Array:
        """Convolution `conv{name}` and norm `norm{name}`.

        The padding is explicit, for PyTorch's: 'SAME' pads an even size on the other side when
        the stride is 2.
        """
        dtype, state_dtype = _dtypes(self.compute_dtype)
        pad = (taps - 1) // 2
        x = nn.Conv(
            self.width,
            (taps, taps),
            strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            use_bias=self.norm == "none",
            dtype=dtype,
            param_dtype=state_dtype,
            kernel_init=_DRAWN_BY_INIT,
            conv_general_dilated=convolutions.conv(self.convolution),
            name=f"conv{name}",
        )(x)
        return _normalise(self.norm, self.compute_dtype, f"norm{name}", x, train)


class _Stem(_ConvolutionalModule):
    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self._fused(train):
            return convolutions.joined(*self._unit("", x, None, 3, 1), None, None)
        return nn.relu(self._convolve("", x, 3, 1, train))


class _Kernel(nn.Module):
    """A convolution's kernel, where `nn.Conv` would have it."""

    shape: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", _DRAWN_BY_INIT, self.shape, self.dtype)


class _Block(_ConvolutionalModule):
    """A basic block; the shortcut is a 1x1 convolution where the stride or the channels change."""

    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        shortcut, same = x, self.stride == 1 and x.shape[-1] == self.width
        if self._fused(train):
            other = (x, None) if same else self._unit("_shortcut", x, None, 1, self.stride)
            first = self._unit("_1", x, None, 3, self.stride)
            return convolutions.joined(*self._unit("_2", *first, 3, 1), *other)
        if not same:
            shortcut = self._convolve("_shortcut", x, 1, self.stride, train)
        x = nn.relu(self._convolve("_1", x, 3, self.stride, train))
        x = self._convolve("_2", x, 3, 1, train)
        return nn.relu(x + shortcut)


class _Blocks(_ConvolutionalModule):
    """`depth` basic blocks `block_1 .. block_depth`, the first of them with the stride."""

    depth: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for block in range(1, self.depth + 1):
            x = _Block(
                self.width,
                self.norm,
                self.compute_dtype,
                self.convolution,
                stride=self.stride if block == 1 else 1,
                name=f"block_{block}",
            )(x, train=train)
        return x


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm over all axes but the last.

    In training, y = scale * (x - mean) / sqrt(var + 1e-5) + bias with the batch's mean and biased
    variance over its n values a channel, and the running statistics become
    0.9 * running + 0.1 * mean and 0.9 * running + 0.1 * var * n / (n - 1). (Flax's own keeps the
    biased variance.) In evaluation mean and var are the running ones. Statistics and
    normalisation are float32 whatever x is, or float64 where x is.
    """

    compute_dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool, statistics: Array | None = None) -> Array:
        """[..., C] -> [..., C], in the type to compute in.

        With the batch's `statistics` at hand, [2, C] of its means and variances, the values are left to be normalised:
        [3, C], to apply as scale * (x - mean) / sqrt(var + 1e-5) + bias, the mean, the factor and the bias.
        """
        dtype, state_dtype = _dtypes(self.compute_dtype)
        shape, axes = (x.shape[-1],), tuple(range(x.ndim - 1))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, state_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, state_dtype)
        x = x.astype(state_dtype)
        if train:
            if statistics is None:
                # Two passes: the mean of squares less the squared mean cancels in float32.
                mean = x.mean(axes)
                var = jnp.square(x - _channels(mean, x)).mean(axes)
            else:
                mean, var = statistics
            n = x.size // x.shape[-1]
            unbiased = var * (n / max(n - 1, 1))
            running_mean.value = _MOMENTUM * running_mean.value + (1 - _MOMENTUM) * mean
            running_var.value = _MOMENTUM * running_var.value + (1 - _MOMENTUM) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        scale, bias = _scale_and_bias(self, shape, state_dtype)
        factor = scale * jax.lax.rsqrt(var + _EPSILON)
        if statistics is not None:
            return jnp.stack([mean, factor, bias])
        x = (x - _channels(mean, x)) * _channels(factor, x)
        return (x + _channels(bias, x)).astype(dtype)


class LayerNorm(nn.Module):
    """Each example normalised over all its values, then a scale and a bias for each channel.

    PyTorch's `LayerNorm(C)` for [B, C] and `GroupNorm(1, C)` for [B, H, W, C]; biased variance.
    """

    compute_dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """[..., C] -> [..., C], in the type to compute in."""
        del train
        dtype, state_dtype = _dtypes(self.compute_dtype)
        axes = tuple(range(1, x.ndim))
        x = x.astype(state_dtype)
        x = x - x.mean(axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + _EPSILON)
        scale, bias = _scale_and_bias(self, (x.shape[-1],), state_dtype)
        return (x * _channels(scale, x) + _channels(bias, x)).astype(dtype)


def _normalise(norm: str, compute_dtype: str, name: str, x: Array, train: bool) -> Array:
    if norm == "none":
        return x
    layer = BatchNorm if norm == "batch" else LayerNorm
    return layer(compute_dtype, name=name)(x, train=train)


def _head(module: Mlp | ResNet, name: str, x: Array) -> Array:
    """Logits [B, classes]; in full precision even where the rest computes in bfloat16."""
    _, state_dtype = _dtypes(module.compute_dtype)
    return nn.Dense(
        module.classes,
        dtype=state_dtype,
        param_dtype=state_dtype,
        kernel_init=_DRAWN_BY_INIT,
        name=name,
    )(x)


def _scale_and_bias(module: nn.Module, shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[Array, Array]:
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    return module.param("scale", ones, shape, dtype), module.param("bias", zeros, shape, dtype)


def _channels(values_C: Array, like: Array) -> Array:
    """[C] -> [1, ..., 1, C] with the rank of `like`."""
    return values_C.reshape((1,) * (like.ndim - 1) + values_C.shape)


def _dtypes(compute_dtype: str) -> tuple[jnp.dtype, jnp.dtype]:
    """The type to compute in, and that of parameters, statistics and logits."""
    if compute_dtype != "float64":
        return jnp.dtype(compute_dtype), jnp.dtype("float32")
    if jax.dtypes.canonicalize_dtype("float64") != "float64":  # else JAX would go on in float32
        raise InputError("compute_dtype is 'float64'; it needs JAX's jax_enable_x64 to be on.")
    return jnp.dtype("float64"), jnp.dtype("float64")


def _unit_variance(initialisation: str, key: Array, size: int) -> Array:
    """[size] independent float32 values with mean 0 and variance 1."""
    if initialisation == "pytorch":
        return jax.random.uniform(key, (size,), jnp.float32, -1, 1) * 3**0.5
    # The standard deviation of a standard normal distribution cut off at -2 and 2.
    return jax.random.truncated_normal(key, -2, 2, (size,), jnp.float32) / 0.8796256610342398


def _constant(path: Sequence[str], leaf: jax.ShapeDtypeStruct) -> Array:
    """What is not drawn: ones for a norm's scale and running variance, else zeros."""
    fill = 1 if path[-1] in ("scale", "var") else 0
    return jnp.full(leaf.shape, fill, leaf.dtype)
