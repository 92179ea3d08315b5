"""The GPU kernels of `kernels.py` without a GPU: interpreted on the CPU, and compiled for two GPUs.

Triton's interpreter is not fast, but its results are right to the bit that fp32 sums allow. The
tests are skipped where Triton is not installed; requirements-test.txt installs it on Linux.
"""
import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import kernels

if not kernels.triton:
    pytest.skip("triton is not installed", allow_module_level=True)
# Where there is a GPU, the kernels run on it.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (N, C, V): one token; one vocabulary entry more than a block; nothing divides by a block; several
# splits; no token at all.
SHAPES = ((1, 8, 5), (3, 16, 129), (65, 33, 130), (67, 16, 2049), (0, 8, 5))

# Shared memory in KiB that one block may use, by compute capability: A100, H100.
SHARED_LIMITS = {80: 163, 90: 227}
KERNELS = ("_forward_kernel", "_backward_kernel")
# (N, C, V) and type of launches that compile to different code: the compiler knows of every pointer
# and every whole number whether it divides by 16. 50,257 entries are an odd vocabulary.
LAUNCHES = {"bf16": ((64, 32, 2048), torch.bfloat16),
            "fp16, odd vocabulary": ((65, 32, 2049), torch.float16),
            "bf16, odd width": ((65, 33, 2049), torch.bfloat16)}
# Bytes that a thread spills, as measured. An odd width, which no model here has, is read number by
# number, and the places and masks of so many numbers do not fit into the registers.
SPILLS = {"_forward_kernel, bf16, odd width, 80": 356, "_forward_kernel, bf16, odd width, 90": 96,
          "_backward_kernel, bf16, odd width, 80": 128}


def inputs(N, C, V, dtype):
    torch.manual_seed(N + V)
    tensors = (torch.randn(N, C).to(dtype), (0.5 * torch.randn(V, C)).to(dtype),
               torch.randint(V, (N,)), torch.randn(2, N))
    return [x.to(DEVICE) for x in tensors]


def run(function, hidden, weight, targets, temperature, upstream):
    """(log-probabilities, entropies, gradients for hidden and weight).

    The gradients are those of Σ upstream[0]·logprobs + upstream[1]·entropy.
    """
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, temperature)
    (logprobs * upstream[0] + entropy * upstream[1]).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", (1.0, 0.6))
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_equals_the_float64_definition(shape, temperature):
    hidden, weight, targets, upstream = inputs(*shape, torch.float32)
    found = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, temperature, upstream)
    exact = run(kernels.token_logprobs_reference, hidden.double(), weight.double(), targets,
                temperature, upstream.double())
    for x, y in zip(found, exact):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1])
def test_bf16_errs_no_more_than_the_reference(shape):
    hidden, weight, targets, upstream = inputs(*shape, torch.bfloat16)
    found = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, 0.8, upstream)
    plain = run(kernels.token_logprobs_reference, hidden, weight, targets, 0.8, upstream)
    exact = run(kernels.token_logprobs_reference, hidden.double(), weight.double(), targets, 0.8,
                upstream.double())
    for x, reference, y in zip(found, plain, exact):
        error, allowed = (x.double() - y).norm(), (reference.double() - y).norm()
        assert 0 < allowed and error <= 2 * allowed     # a few dozen roundings, in another order


def test_gradient_blocks_add_up():
    hidden, weight, targets, upstream = inputs(150, 16, 40, torch.float32)
    whole = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, 1.0, upstream)
    with mock.patch.object(kernels, "GRADIENT_ELEMENTS", 1):                # 64 tokens at a time
        parts = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets, 1.0, upstream)
    for x, y in zip(parts, whole):
        torch.testing.assert_close(x, y)


def test_a_token_without_weight_in_the_loss_gets_no_gradient():
    hidden, weight, targets, upstream = inputs(70, 16, 200, torch.float32)
    *_, grad_hidden, grad_weight = run(kernels._TritonTokenLogprobs.apply, hidden, weight, targets,
                                       1.0, upstream * 0)
    assert not grad_hidden.any() and not grad_weight.any()


def test_logits_of_1e4_stay_finite():
    hidden = torch.tensor([[1e4]] * 3, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.], [0.], [-1.]], device=DEVICE, requires_grad=True)
    logprobs, entropy = kernels._TritonTokenLogprobs.apply(hidden, weight,
                                                           torch.arange(3, device=DEVICE), 1.0)
    assert logprobs.tolist() == [0, -1e4, -2e4] and entropy.tolist() == [0, 0, 0]
    (logprobs + entropy).sum().backward()
    assert hidden.grad[:, 0].tolist() == [0, -1, -2] and weight.grad.isfinite().all()


class Recorder:
    """A recorder stands in for a kernel and keeps what it was launched with."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **keywords):
        self.args, self.keywords = args, keywords


def recorded(N, C, V, dtype) -> list[Recorder]:
    """`kernels.py` launches both kernels as on a GPU, and recorders keep the arguments."""
    found = [Recorder(getattr(kernels, name)) for name in KERNELS]
    hidden, weight = torch.zeros(N, C, dtype=dtype, requires_grad=True), torch.zeros(V, C).to(dtype)
    with mock.patch.multiple(kernels, **dict(zip(KERNELS, found))):
        logprobs, entropy = kernels._TritonTokenLogprobs.apply(
            hidden, weight, torch.zeros(N, dtype=torch.int64), 1.0)
        (logprobs + entropy).sum().backward()
    return found


def compile_launch(launch: Recorder, capability: int) -> dict:
    """Triton compiles a recorded launch as at that call on a GPU; returns what the code needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
             torch.int64: "i64", int: "i32", float: "fp32"}
    parameters = inspect.signature(launch.kernel.fn).parameters
    constants = {name: x for name, x in launch.keywords.items() if name in parameters}
    options = {name: x for name, x in launch.keywords.items() if name not in parameters}
    # Raises TypeError where the arguments are not those of the kernel.
    given = inspect.signature(launch.kernel.fn).bind(*launch.args, **constants).arguments
    signature, attributes = {}, {}
    for i, (name, x) in enumerate(given.items()):
        pointer = isinstance(x, torch.Tensor)
        signature[name] = ("constexpr" if name in constants else
                           "*" + names[x.dtype] if pointer else names[type(x)])
        place = x.data_ptr() if pointer else x
        if name not in constants and isinstance(place, int) and place % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    with contextlib.redirect_stdout(io.StringIO()) as ptxas:
        compiled = kernels.triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32), options=options)
    counts = {"registers": r"Used (\d+) registers", "spills": r"(\d+) bytes spill stores"}
    matches = {name: re.search(pattern, ptxas.getvalue()) for name, pattern in counts.items()}
    return {"elf": compiled.asm["cubin"][:4] == b"\x7fELF", "shared": compiled.metadata.shared,
            **{name: int(match[1]) for name, match in matches.items() if match}}


def compile_all() -> None:
    """Triton compiles every launch for every GPU, and this function prints a line of JSON.

    It needs a process of its own, because a process interprets either all kernels or none.
    """
    print(json.dumps({f"{launch.kernel.__name__}, {name}, {capability}":
                      compile_launch(launch, capability)
                      for name, (shape, dtype) in LAUNCHES.items()
                      for launch in recorded(*shape, dtype) for capability in SHARED_LIMITS}))


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory):
    """A process without the interpreter compiles every launch while the other tests run."""
    # kernels.py imports Triton where there could be a GPU.
    command = ("from unittest import mock\n"
               "with mock.patch('torch.backends.cuda.is_built', return_value=True):\n"
               "    import test_triton\n"
               "test_triton.compile_all()")
    here = Path(__file__).parent
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join((str(here), str(here.parent))), "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    with subprocess.Popen([sys.executable, "-c", command], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()              # has ended, unless the tests that wait for it did not run


@pytest.fixture(scope="module")
def compiled(compiler) -> dict:
    """The compiler says what each launch needs."""
    output, errors = compiler.communicate()
    assert compiler.returncode == 0, output + errors
    return json.loads(output)


@pytest.mark.parametrize("capability", SHARED_LIMITS)
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_and_fit_the_gpu(compiled, kernel, launch, capability, record_property):
    name = f"{kernel}, {launch}, {capability}"
    found = compiled[name]
    print(name, found)
    for key, x in found.items():
        record_property(key, x)
    assert found["elf"]
    assert 0 < found["shared"] <= SHARED_LIMITS[capability] * 1024
    spilled, allowed = found.get("spills", 0), SPILLS.get(name, 0)      # no log: not known, 0
    assert spilled <= allowed
