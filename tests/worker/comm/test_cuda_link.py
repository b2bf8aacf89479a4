"""The worker for GPUs is linked with the real libraries: every CUDA and NCCL name that it uses is theirs."""

import os
import pathlib
import subprocess

WORKER = os.environ["SIMPO_CUDA_WORKER"]
TORCH_DIR = pathlib.Path(os.environ["SIMPO_TORCH_DIR"])


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def names(file, *, defined):
    """The dynamic symbols that `file` defines, or wants from others."""
    lines = run("nm", "-D", "--defined-only" if defined else "--undefined-only", str(file)).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def library(pattern):
    found = list(TORCH_DIR.glob(pattern))
    assert len(found) == 1, f"{pattern} in {TORCH_DIR}: {found}; run deploy/install-deps.sh"
    return found[0]


def test_every_nccl_and_cuda_name_is_in_the_real_libraries():
    wanted = names(WORKER, defined=False)
    nccl = {name for name in wanted if name.startswith("nccl")}
    cuda = {name for name in wanted if name.startswith("cuda")}
    c10_cuda = {name for name in wanted if "3c104cuda" in name}
    # What the code calls; a worker that lost its collectives to the linker would want none.
    assert {"ncclCommInitRankConfig", "ncclAllReduce", "ncclReduceScatter", "ncclAllGather", "ncclBroadcast",
            "ncclCommAbort", "ncclCommGetAsyncError"} <= nccl
    assert {"cudaEventRecord", "cudaStreamWaitEvent", "cudaEventQuery", "cudaMemcpyAsync"} <= cuda
    assert c10_cuda
    assert nccl <= names(library("nvidia/nccl/lib/libnccl.so.*"), defined=True)
    assert cuda <= names(library("nvidia/cu*/lib/libcudart.so.*"), defined=True)
    assert c10_cuda <= names(library("torch/lib/libc10_cuda.so"), defined=True)


def test_the_loader_is_told_of_them():
    needed = run("readelf", "-d", WORKER)
    for name in ("libtorch_cuda.so", "libc10_cuda.so", "libcudart.so.", "libnccl.so."):
        assert f"[{name}" in needed, f"{WORKER} does not load {name}"


def test_names_of_the_stand_in_are_not_in_it():
    assert "stand_in" not in run("nm", "-C", WORKER)
