"""What a user would write instead of our core: Flax's layers, Optax's optimiser, one trial, random batches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from plastic_jax.study.config import Config
from plastic_jax.train.state import Data


class Plain(nn.Module):
    """The point's network for one trial, of Flax's own layers."""

    point: Config
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [B, classes] of normalised images [B, H, W, C]."""
        dtype = jnp.dtype(self.point.compute_dtype)

        def norm(x: jax.Array) -> jax.Array:
            if self.point.norm == "none":
                return x
            if self.point.norm == "layer":
                layer = nn.GroupNorm(1, epsilon=1e-5, dtype=dtype) if x.ndim == 4 else nn.LayerNorm(1e-5, dtype=dtype)
                return layer(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x)

        def conv(x: jax.Array, features: int, taps: int = 3, stride: int = 1) -> jax.Array:
            pad = ((taps - 1) // 2, (taps - 1) // 2)
            bias = self.point.norm == "none"
            return norm(nn.Conv(features, (taps, taps), stride, (pad, pad), use_bias=bias, dtype=dtype)(x))

        x = x.astype(dtype)
        if self.point.model == "mlp":
            x = x.reshape(len(x), -1)
            for _ in range(self.point.depth):
                x = nn.relu(norm(nn.Dense(self.point.width, dtype=dtype)(x)))
            return nn.Dense(self.classes)(x.astype(jnp.float32))
        x = nn.relu(conv(x, self.point.width))
        for module in range(4):
            for block in range(self.point.depth):
                features, stride = self.point.width * 2**module, 2 if module and not block else 1
                y = conv(nn.relu(conv(x, features, stride=stride)), features)
                x = nn.relu(y + (x if x.shape == y.shape else conv(x, features, 1, stride)))
        return nn.Dense(self.classes)(x.astype(jnp.float32).mean((1, 2)))


def plain_step(point: Config, data: Data, classes: int) -> tuple[Any, Any]:
    """`state(seed)` and `step(state, key, data)` of one trial; a step draws its batch with the key."""
    net, rate = Plain(point, classes), point.learning_rate
    optimiser = {
        "adam": optax.adam(rate), "rmsprop": optax.rmsprop(rate), "sgd": optax.sgd(rate),
        "momentum": optax.sgd(rate, 0.9),
    }[point.optimizer]  # fmt: skip

    def normalised(images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) / 255 - 0.5) / 0.5

    def state(seed: Any) -> Any:
        variables = net.init(jax.random.key(seed), normalised(data.train_images[:1]), train=False)
        return variables, optimiser.init(variables["params"])

    def step(state: Any, key: jax.Array, data: Data) -> Any:
        variables, moments = state
        chosen = jax.random.randint(key, (point.batch_size,), 0, len(data.train_labels))
        images, labels = normalised(data.train_images[chosen]), data.train_labels[chosen]

        def loss(params: Any) -> Any:
            logits, new = net.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        gradients, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, moments = optimiser.update(gradients, moments)
        return {**new, "params": optax.apply_updates(variables["params"], updates)}, moments

    return state, step
