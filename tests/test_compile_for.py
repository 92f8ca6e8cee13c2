"""A step compiled for a device that is not there: what is counted, what is refused, and how much there is of it."""

import collections
import importlib.util
import re
import subprocess
import sys

import pytest

from plastic_jax.benchmarks import compile_for, ways
from plastic_jax.kernels import Form
from plastic_jax.study.config import Config
from plastic_jax.train import costs

# A GPU's: cuDNN's convolution with a workspace, a product, fusions of each kind, an operand behind a comment.
GPU = """HloModule jit_step

%fused_reduce (p: f32[8]) -> f32[] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[] reduce(%p, %p)
}

ENTRY %main (a: bf16[2,4,4,3], k: bf16[8,3,3,3]) -> f32[8] {
  %a = bf16[2,4,4,3]{3,2,1,0} parameter(0), metadata={op_name="images"}
  %k = bf16[8,3,3,3]{3,2,1,0} parameter(1)
  %zero = f32[] constant(0)
  %loop_transpose_fusion = bf16[2,3,4,4]{3,2,1,0} fusion(%a), kind=kLoop, calls=%f1, metadata={op_name="net/enter"}
  %cudnn-conv.1 = (bf16[2,4,4,8]{3,2,1,0}, u8[4096]{0}) custom-call(%a, %k), window={size=3x3}, custom_call_target="x"
  %y = bf16[2,4,4,8]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %flat = bf16[256]{0} bitcast(%y)
  %input_reduce_fusion = (f32[8]{0}, f32[8]{0}) fusion(%y), kind=kInput, calls=%fused_reduce
  %s = f32[8]{0} get-tuple-element(%input_reduce_fusion), index=0
  %gemm_fusion_dot.2 = f32[8]{0} fusion(%s, %s), kind=kCustom, calls=%f2
  %copy.3 = f32[8]{0} copy(%s)
  ROOT %add_fusion = f32[8]{0} fusion(%s, %s, %zero, %zero, %zero, /*index=5*/%y), kind=kLoop, calls=%f3
}
"""
# A TPU's: what goes in or out of fast memory beside the computation, and a fusion that holds a convolution.
TPU = """HloModule jit_step

%inner (x: bf16[4,8,8,2]) -> bf16[4,8,8,2] {
  %x = bf16[4,8,8,2]{3,2,1,0} parameter(0)
  ROOT %c = bf16[4,8,8,2]{3,2,1,0:T(8,128)(2,1)} convolution(%x, %x), window={size=3x3}
}

%outer.1 (x: bf16[4,8,8,2]) -> bf16[4,8,8,2] {
  %x.1 = bf16[4,8,8,2]{3,2,1,0} parameter(0)
  ROOT %f = bf16[4,8,8,2]{3,2,1,0} fusion(%x.1), kind=kOutput, calls=%inner
}

ENTRY %main.1 (w: f32[2,64], x: bf16[4,8,8,2]) -> bf16[4,8,8,2] {
  %w = f32[2,64]{1,0:T(2,128)} parameter(0)
  %x.2 = bf16[4,8,8,2]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (f32[2,64]{1,0:T(2,128)S(1)}, f32[2,64]{1,0:T(2,128)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = f32[2,64]{1,0:T(2,128)S(1)} copy-done(%copy-start)
  %joined = f32[2,64]{1,0:T(2,128)S(1)} custom-call(%copy-done), custom_call_target="ConcatBitcast"
  %reshape.1 = f32[128]{0:T(128)} reshape(%joined)
  ROOT %fusion.7 = bf16[4,8,8,2]{3,2,1,0:T(8,128)(2,1)} fusion(%x.2, %reshape.1), kind=kOutput, calls=%outer.1
}
"""


def test_a_gpus_launches_are_counted_by_kind_with_the_bytes_they_move():
    images, kernel, outputs = 2 * 96, 2 * 216, 2 * 256
    assert [(launch.kind, launch.moved) for launch in compile_for.launches(GPU)] == [
        ("copy or transpose", 2 * images),
        ("convolution", outputs + images + kernel),  # without its workspace
        ("reduction", 2 * 32 + outputs),
        ("product", 3 * 32),
        ("copy or transpose", 2 * 32),
        ("elementwise", 3 * 32 + 3 * 4 + outputs),
    ]
    transposed = compile_for.launches(GPU)[0]
    assert (transposed.made, transposed.source) == ("bf16[2,3,4,4]{3,2,1,0}", "net/enter")


def test_a_tpus_copies_into_fast_memory_are_no_changes_of_layout():
    assert [(launch.kind, launch.moved) for launch in compile_for.launches(TPU)] == [
        ("between memories", 2 * 512 + 8),
        ("copy or transpose", 2 * 512),
        ("convolution", 2 * 1024 + 512),
    ]


@pytest.mark.parametrize(
    ("types", "size"),
    [
        ("f32[]", 4),
        ("pred[3,5]{1,0}", 15),
        ("(bf16[2,3]{1,0}, /*index=1*/s32[4]{0}, token[])", 12 + 16),
        ("(f32[10]{0}, u8[100]{0})", 140),
        ("f32[0,7]{1,0}", 0),
    ],
)
def test_bytes_of_types(types, size):
    assert compile_for._size(types) == size


def test_a_workspace_is_not_counted():
    assert compile_for._size("(f32[10]{0}, u8[100]{0})", skip="u8") == 40


def command(*arguments):
    call = [sys.executable, "-m", "experiments.throughput", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=240)


INSTALLED = {"h100": importlib.util.find_spec("jax_cuda13_plugin"), "tpu-v5e": importlib.util.find_spec("libtpu")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--compile_for=b200",), "one of h100, tpu-v5e"),
        (("--compile_for=h100", "--config.trials=0"), "whole numbers from 1 to 4096"),
    ],
)
def test_what_cannot_be_compiled_for_is_one_sentence(arguments, says):
    refused(command(*arguments), says)


@pytest.mark.parametrize(("platform", "extra"), [("h100", "cuda"), ("tpu-v5e", "tpu")])
def test_a_missing_extra_is_one_sentence(platform, extra):
    if INSTALLED[platform]:
        pytest.skip(f"the extra {extra} is installed")
    refused(command(f"--compile_for={platform}"), f"pip install -e '.[{extra}]'")


def refused(ended, says):
    assert ended.returncode == 2 and ended.stdout == ""
    assert says in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def compiled(platform, width, block, group):
    """Launches and temporaries of a step of ResNet-18, batch 128, bfloat16."""
    if not INSTALLED[platform]:
        pytest.skip(f"{platform} needs the extra {compile_for.PLATFORMS[platform]}")
    point = Config(model="resnet", width=width, batch_size=128, compute_dtype="bfloat16")
    form, spec = Form("packed", block, group), ways.SPECS["resnet"]
    step = compile_for.lowered_step(point, spec, form, compile_for.absent(platform)).compile()
    planned = costs.costs(point, spec).step_temporaries(block, group)
    return compile_for.launches(step.as_text()), step.memory_analysis().temp_size_in_bytes, planned


def images(launches):
    """Those that copy or transpose images or what layers make of them: [..., B, H, W, C], and K and G before C."""
    shape = re.compile(r"\d,(32,32|16,16|8,8|4,4),(\d+,){0,2}\d+\]")
    return [one for one in launches if one.kind == "copy or transpose" and shape.search(one.made)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "block", "group", "most"), [(64, 4, 1, 122), (64, 8, 1, 91), (8, 16, 16, 18.2), (8, 64, 16, 8.5)]
)
def test_a_step_on_an_h100(width, block, group, most):
    launches, temporaries, planned = compiled("h100", width, block, group)
    assert len(launches) / block <= most
    kinds = collections.Counter(launch.kind for launch in launches)
    assert kinds["convolution"] == 59 * block // group  # 20 forward, 20 for kernels, 19 for inputs
    assert kinds["product"] == 3
    # No layer's activations change their layout, but the images, whose 3 channels the trials of a group share.
    moved = [one.made for one in launches if one.kind == "copy or transpose" and one.moved > 1e5]
    assert len(moved) <= 1 and all(f"[128,32,32,{block // group},{group},3]" in made for made in moved)
    assert temporaries == pytest.approx(planned, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "block", "group", "megabytes"), [(8, 16, 16, 40), (64, 4, 1, 600)])
def test_a_step_on_a_tpu(width, block, group, megabytes):
    """Here XLA moves kernels and their moments into the layout of their gradients and back, as it does no images."""
    launches, _, _ = compiled("tpu-v5e", width, block, group)
    kinds = collections.Counter(launch.kind for launch in launches)
    assert kinds["convolution"] == 59 * block // group + 3  # products are convolutions there
    assert all(re.search(r"32,32,(\d+,)?3\]", one.made) for one in images(launches))
    others = [one.moved for one in launches if one.kind == "copy or transpose"]
    assert sum(others) / block / 1e6 <= megabytes
