"""PyTorch's side of the throughput benchmark: one process that trains one trial, one step after another.

    python -m plastic_jax.benchmarks.torch_worker '{"model": "resnet", "width": 8, ...}'

A JSON object of `Work`'s fields comes in as the argument; for each line {"steps": n} on standard input the worker runs
n training steps and answers {"seconds": ..., "loss": ...}. It imports PyTorch and the standard library alone, so that
it runs in an environment of its own. The network, its initialisation, the optimisers and the input pipeline (a gather
from resident uint8 images, normalised) are those of the core.
"""

# pyright: reportMissingImports=false
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Work:
    """What to train, and how: `shape` [H, W, C] of an image, `threads` of a CPU, `tf32` for a GPU's float32."""

    model: str
    width: int
    depth: int
    norm: str
    batch_size: int
    optimizer: str
    shape: tuple[int, int, int]
    classes: int
    compiled: bool = False
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    tf32: bool = True
    examples: int = 2048
    mode: str = "default"  # torch.compile's


def network(work: Work) -> Any:
    """The core's network (plastic_jax/models) in PyTorch, with PyTorch's own initialisation."""
    from torch import nn

    def norm(channels: int, images: bool) -> list[Any]:
        if work.norm == "none":
            return []
        if work.norm == "layer":
            return [nn.GroupNorm(1, channels) if images else nn.LayerNorm(channels)]
        return [nn.BatchNorm2d(channels) if images else nn.BatchNorm1d(channels)]

    if work.model == "mlp":
        layers: list[Any] = [nn.Flatten()]
        inputs = work.shape[0] * work.shape[1] * work.shape[2]
        for _ in range(work.depth):
            layers += [nn.Linear(inputs, work.width), *norm(work.width, False), nn.ReLU()]
            inputs = work.width
        return nn.Sequential(*layers, nn.Linear(inputs, work.classes))

    def convolution(inputs: int, outputs: int, taps: int, stride: int) -> list[Any]:
        layer = nn.Conv2d(inputs, outputs, taps, stride, (taps - 1) // 2, bias=work.norm == "none")
        return [layer, *norm(outputs, True)]

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            first = [*convolution(inputs, outputs, 3, stride), nn.ReLU(inplace=True)]
            self.body = nn.Sequential(*first, *convolution(outputs, outputs, 3, 1))
            alike = stride == 1 and inputs == outputs
            self.shortcut = nn.Identity() if alike else nn.Sequential(*convolution(inputs, outputs, 1, stride))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            return self.relu(self.body(x) + self.shortcut(x))

    modules: list[Any] = [*convolution(work.shape[2], work.width, 3, 1), nn.ReLU(inplace=True)]
    inputs = work.width
    for module in range(4):
        for block in range(work.depth):
            modules.append(Block(inputs, work.width * 2**module, 2 if module and not block else 1))
            inputs = work.width * 2**module
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, work.classes))


def _optimiser(work: Work, parameters: Any) -> Any:
    from torch import optim

    if work.optimizer == "adam":
        return optim.Adam(parameters, 1e-3, fused=True)
    if work.optimizer == "rmsprop":
        return optim.RMSprop(parameters, 1e-3, foreach=True)
    return optim.SGD(parameters, 1e-3, momentum=0.9 if work.optimizer == "momentum" else 0.0, fused=True)


def trainer(work: Work) -> Callable[[int], float]:
    """A function that trains for so many steps and returns the last loss."""
    import torch

    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    if work.device == "cuda":
        torch.set_float32_matmul_precision("high" if work.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = work.tf32
        torch.backends.cudnn.benchmark = True
    height, width, channels = work.shape
    images = torch.randint(0, 256, (work.examples, channels, height, width), dtype=torch.uint8, device=work.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, work.classes, (work.examples,), device=work.device)
    net = network(work).to(work.device).to(memory_format=torch.channels_last).train()
    optimiser = _optimiser(work, net.parameters())
    half = work.dtype == "bfloat16"

    def loss_of(chosen: Any) -> Any:
        inputs = (images[chosen].to(torch.float32) / 255 - 0.5) / 0.5
        with torch.autocast(work.device, torch.bfloat16, enabled=half):
            logits = net(inputs)
        return torch.nn.functional.cross_entropy(logits.float(), labels[chosen])

    if work.compiled:
        loss_of = torch.compile(loss_of, mode=work.mode)

    def train(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            chosen = torch.randint(0, work.examples, (work.batch_size,), device=work.device)
            loss = loss_of(chosen)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        return float(loss.detach())  # waits for the device

    return train


def main() -> None:
    """Answer the parent's lines until its end of standard input."""
    given = json.loads(sys.argv[1])
    work = Work(**{**given, "shape": tuple(given["shape"])})
    import torch

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    begin = time.perf_counter()
    train = trainer(work)
    train(3)
    answer(ready=time.perf_counter() - begin, version=torch.__version__)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        begin = time.perf_counter()
        loss = train(steps)
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() if work.device == "cuda" else 1024 * _peak_kib()
        answer(seconds=seconds, loss=loss, peak_bytes=peak)


def _peak_kib() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
