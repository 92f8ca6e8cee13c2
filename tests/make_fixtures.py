"""Makes tests/fixtures/*.npz (all but draws.npz) with PyTorch, the reference for models and optimisers.

Run once, in an environment of its own (PyTorch is no dependency of the project), and again only
when a fixture's content has to change:

    python -m venv torch_env && torch_env/bin/pip install torch==2.13.0 numpy
    torch_env/bin/python tests/make_fixtures.py

Everything is computed in float64 from float32 values. The arrays of a network's fixture:

    images [B, H, W, C], labels [B]
    params/...        parameters, under Flax's names and in Flax's layouts
    stats/...         running statistics before the step
    {train,eval}/logits [B, classes], /loss (mean cross-entropy)
    {train,eval}/grads/...   the loss's gradients (eval: only where EVAL_GRADIENTS says so)
    train/stats/...   running statistics after the step
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent / "fixtures"
IMAGE = (9, 8, 3)  # an odd and an even size: strides treat them differently
BATCH, CLASSES = 5, 4
NETWORKS = {
    "mlp_batch": ("mlp", 6, 2, "batch"),
    "mlp_layer": ("mlp", 6, 2, "layer"),
    "mlp_none": ("mlp", 6, 2, "none"),
    "resnet_batch_1": ("resnet", 2, 1, "batch"),
    "resnet_batch_2": ("resnet", 2, 2, "batch"),
    "resnet_layer": ("resnet", 2, 1, "layer"),
    "resnet_none": ("resnet", 2, 1, "none"),
}
EVAL_GRADIENTS = ("mlp_batch", "resnet_batch_1")
STEPS = 20
OPTIMISERS = {
    "adam": lambda params, decay: torch.optim.Adam(params, weight_decay=decay),
    "adam_decoupled": lambda params, decay: torch.optim.AdamW(params, weight_decay=decay),
    "rmsprop": lambda params, decay: torch.optim.RMSprop(params, weight_decay=decay),
    "sgd": lambda params, decay: torch.optim.SGD(params, weight_decay=decay),
    "momentum": lambda params, decay: torch.optim.SGD(params, momentum=0.9, weight_decay=decay),
}


class Layer(nn.Module):
    """A linear layer or a convolution, and its norm, under the project's names."""

    def __init__(self, inputs, outputs, norm, taps=None, stride=1, suffix=""):
        super().__init__()
        if taps is None:
            self.order = ["linear"]
            self.add_module("linear", nn.Linear(inputs, outputs))
            norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        else:
            self.order = [f"conv{suffix}"]
            convolution = nn.Conv2d(inputs, outputs, taps, stride, padding=taps // 2, bias=norm == "none")
            self.add_module(self.order[0], convolution)
            norms = {"batch": nn.BatchNorm2d, "layer": lambda channels: nn.GroupNorm(1, channels)}
        if norm != "none":
            self.order.append(f"norm{suffix}")
            self.add_module(self.order[1], norms[norm](outputs))

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


class Activated(Layer):
    def forward(self, x):
        return torch.relu(super().forward(x))


class Block(nn.Module):
    """A basic block (He et al. 2016)."""

    def __init__(self, inputs, outputs, norm, stride):
        super().__init__()
        self.first = Layer(inputs, outputs, norm, 3, stride, "_1")
        self.second = Layer(outputs, outputs, norm, 3, 1, "_2")
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = Layer(inputs, outputs, norm, 1, stride, "_shortcut")

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class Blocks(nn.Sequential):
    def __init__(self, inputs, outputs, norm, stride, depth):
        super().__init__()
        for block in range(depth):
            first = block == 0
            self.add_module(
                f"block_{block + 1}",
                Block(inputs if first else outputs, outputs, norm, stride if first else 1),
            )


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def network(model, width, depth, norm, channels=IMAGE[2], classes=CLASSES):
    layers = nn.Sequential()
    if model == "mlp":
        inputs = int(np.prod(IMAGE))
        for layer in range(depth):
            layers.add_module(f"module_{layer + 1}", Activated(inputs, width, norm))
            inputs = width
        layers.add_module(f"module_{depth + 1}", nn.Linear(inputs, classes))
        return layers
    layers.add_module("module_1", Activated(channels, width, norm, 3))
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers.add_module(f"module_{stage + 2}", Blocks(inputs, outputs, norm, 1 if stage == 0 else 2, depth))
        inputs = outputs
    layers.add_module("pool", Pool())
    layers.add_module("module_6", nn.Linear(inputs, classes))
    return layers


def flax_name(name):
    """PyTorch's dotted name to Flax's path: the block's first/second/shortcut levels vanish."""
    *path, leaf = [part for part in name.split(".") if part not in ("first", "second", "shortcut")]
    if leaf == "weight":
        leaf = "scale" if path[-1].startswith("norm") else "kernel"
    leaf = {"running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
    return "/".join([*path, leaf])


def flax_layout(tensor):
    array = tensor.detach().numpy()
    if array.ndim == 4:  # OIHW -> HWIO
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def flax_arrays(prefix, named):
    return {f"{prefix}/{flax_name(name)}": flax_layout(tensor) for name, tensor in named}


def statistics(net):
    return [item for item in net.named_buffers() if "num_batches_tracked" not in item[0]]


def network_fixture(name):
    model, width, depth, norm = NETWORKS[name]
    random = np.random.default_rng(seed_of(name))
    net = network(model, width, depth, norm).double()
    with torch.no_grad():
        for key, tensor in [*net.named_parameters(), *statistics(net)]:
            draw = random.standard_normal(tensor.shape)
            if tensor.ndim > 1:
                draw *= (2 / np.prod(tensor.shape[1:])) ** 0.5
            elif key.endswith("weight"):
                draw = 1 + 0.3 * draw
            elif key.endswith("running_var"):
                draw = np.exp(0.5 * draw)
            else:
                draw = 0.3 * draw
            tensor.copy_(torch.tensor(draw.astype(np.float32)))
    images = random.standard_normal((BATCH, *IMAGE)).astype(np.float32)
    labels = random.integers(CLASSES, size=BATCH).astype(np.int32)
    layout = images.reshape(BATCH, -1) if model == "mlp" else images.transpose(0, 3, 1, 2)
    inputs = torch.tensor(np.ascontiguousarray(layout)).double()

    out = {"images": images, "labels": labels}
    out |= {k: v.astype(np.float32) for k, v in flax_arrays("params", net.named_parameters()).items()}
    out |= {k: v.astype(np.float32) for k, v in flax_arrays("stats", statistics(net)).items()}
    for mode in ("eval", "train"):  # training changes the running statistics: it comes last
        net.train(mode == "train").zero_grad()
        logits = net(inputs)
        loss = nn.functional.cross_entropy(logits, torch.tensor(labels).long())
        loss.backward()
        out |= {f"{mode}/logits": logits.detach().numpy(), f"{mode}/loss": loss.detach().numpy()}
        if mode == "train" or name in EVAL_GRADIENTS:
            gradients = [(key, tensor.grad) for key, tensor in net.named_parameters()]
            out |= flax_arrays(f"{mode}/grads", gradients)
    out |= flax_arrays("train/stats", statistics(net))
    out["spec"] = json.dumps({"model": model, "width": width, "depth": depth, "norm": norm})
    return out


def seed_of(name):
    """A seed for the name that is the same in every process, unlike `hash`."""
    return int.from_bytes(name.encode(), "little") % 2**32


def optimisers_fixture():
    """Parameters after each of 20 steps with given gradients and a rate that changes.

    Some gradients are tiny or zero, so that the place of eps shows.
    """
    random = np.random.default_rng(0)
    params = random.standard_normal(12).astype(np.float32)
    scales = 10.0 ** np.array([0, 0, 0, 0, -2, -4, -6, -7, -8, -9, 1, 2])
    grads = (random.standard_normal((STEPS, 12)) * scales).astype(np.float32)
    grads[:, 0] = 0
    grads[3:, 1] = 0
    rates = 0.01 * (1 + np.arange(STEPS) % 3)
    out = {"params": params, "grads": grads, "rates": rates}
    for name, make in OPTIMISERS.items():
        for decay in (0.0, 0.1):
            if decay == 0 and name.endswith("decoupled"):
                continue
            tensor = torch.tensor(params).double().requires_grad_()
            optimiser = make([tensor], decay)
            after = []
            for grad, rate in zip(grads, rates, strict=True):
                optimiser.param_groups[0]["lr"] = rate
                tensor.grad = torch.tensor(grad).double()
                optimiser.step()
                after.append(tensor.detach().numpy().copy())
            out[f"{name}/{decay}"] = np.stack(after)
    return out


def initialisation_fixture():
    """[largest absolute value, standard deviation] of PyTorch's default layers, large ones."""
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(300, 2000), "conv": nn.Conv2d(128, 512, 3)}
    return {
        f"{name}/{leaf}": np.array([tensor.abs().max().item(), tensor.std().item()])
        for name, layer in layers.items()
        for leaf, tensor in (("kernel", layer.weight), ("bias", layer.bias))
    }


def main():
    FOLDER.mkdir(exist_ok=True)
    full = network("resnet", 64, 2, "batch", channels=3, classes=10)
    assert sum(tensor.numel() for tensor in full.parameters()) == 11_173_962
    for name in NETWORKS:
        np.savez_compressed(FOLDER / f"{name}.npz", **network_fixture(name))
    np.savez_compressed(FOLDER / "optimisers.npz", **optimisers_fixture())
    np.savez_compressed(FOLDER / "initialisation.npz", **initialisation_fixture())
    for path in sorted(FOLDER.glob("*.npz")):
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
