"""The arrows between the folders, as docs/architecture.md draws them: read from the sources themselves."""

import importlib.util
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

TORCH = r"(torch|ATen|c10|caffe2)/"
MPI = r"(mpi\.h|mpi/|openmpi/)"
GRPC = r"(grpc|grpcpp|grpc\+\+)/"
PROTO = r"(simpo/v1/|google/protobuf/)"

# folder: what its files may never include.
FORBIDDEN = {
    "common": [TORCH, MPI, GRPC, PROTO, r"(coordinator|simpoctl|worker|tests)/"],
    "coordinator": [TORCH, MPI, r"(simpoctl|worker|tests)/"],
    "simpoctl": [TORCH, MPI, r"(coordinator|worker|tests)/", r"(sqlite3\.h|prometheus/|httplib\.h)"],
    "worker": [r"(coordinator|simpoctl|tests)/", r"(sqlite3\.h|prometheus/|httplib\.h)"],
    # Rows and tokens need no tensors, numbers no network.
    "worker/data": [TORCH, MPI, GRPC, PROTO],
    "worker/model": [MPI, GRPC, PROTO, r"worker/(comm|data)/"],
    "worker/comm": [GRPC, PROTO, r"worker/(?!comm/)"],
    "worker/shard": [MPI, GRPC, PROTO],
}

# One file each that alone may know a thing.
ONLY_IN = {
    MPI: {"worker/comm/join_world.cc", "worker/comm/collectives_mpi.cc"},
    r"worker/hf_ffi/": {f"worker/data/{name}" for name in ("chat_template.cc", "chat_template.h", "ffi_bytes.h",
                                                           "tokenizer.cc", "tokenizer.h")},
    r"nccl\.h": {"worker/comm/collectives_nccl.cc"},
    r"(cuda_runtime|c10/cuda|ATen/cuda)": {"worker/comm/cuda_calls.cc", "worker/comm/cuda_calls.h"},
    r"sqlite3\.h": {"coordinator/sqlite.cc", "coordinator/sqlite.h"},
    r"coordinator/launcher_\w+\.h": {"coordinator/server.cc", "coordinator/launcher_mpirun.cc"},
}


def sources(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".h", ".cc") and "target" not in path.parts]
    assert files, f"no sources in {folder}"
    return files


def includes(path):
    return INCLUDE.findall(path.read_text())


def breaches(folder, patterns):
    return [f"{path.relative_to(ROOT)} includes {name}"
            for path in sources(folder) for name in includes(path)
            if any(re.match(pattern, name) for pattern in patterns)]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_include_against_the_arrows(folder):
    assert not breaches(folder, FORBIDDEN[folder])


@pytest.mark.parametrize("pattern", ONLY_IN)
def test_what_few_files_may_include(pattern):
    found = {str(path.relative_to(ROOT)) for folder in ("common", "coordinator", "simpoctl", "worker")
             for path in sources(folder) if any(re.match(pattern, name) for name in includes(path))}
    assert found <= ONLY_IN[pattern], found - ONLY_IN[pattern]
    assert found, f"nothing includes {pattern}: the rule is stale"


def step_sources():
    """What the preset cuda-step compiles."""
    cmake = (ROOT / "worker/CMakeLists.txt").read_text() + (ROOT / "worker/model/CMakeLists.txt").read_text()
    files = {ROOT / "worker" / name for library in ("simpo_step", "simpo_nccl", "simpo_cuda")
             for name in re.search(rf"add_library\({library} \w+([^)]*)\)", cmake).group(1).split() if name.endswith(".cc")}
    files |= {ROOT / "worker/model" / name
              for name in re.search(r"add_library\(simpo_model_config STATIC([^)]*)\)", cmake).group(1).split()}
    return files | {ROOT / "worker/model/row_kernels.cc", ROOT / "common/log.cc", ROOT / "tests/gpu/gpu_test.cc",
                    ROOT / "tests/worker/comm/stand_in.cc", ROOT / "tests/worker/comm/nccl_stand_in.cc"}


def test_the_training_step_needs_torch_alone():
    """A machine with GPUs that has torch, g++ and CMake builds it (docs/gpu.md): no header of any other library, however
    far down, although on this machine they would all be found."""
    allowed = re.compile(r"(ATen|c10|torch)/|cuda_runtime_api\.h$|nccl\.h$|[a-z_]+$|(math|stdlib|string|time|unistd)\.h$")
    ours = re.compile(r"(common|worker|tests)/")
    to_read, seen = step_sources(), set()
    assert len(to_read) > 20
    while to_read:
        path = to_read.pop()
        seen.add(path)
        for name in includes(path):
            if ours.match(name):
                to_read |= {ROOT / name} - seen
            else:
                assert allowed.match(name), f"{path.relative_to(ROOT)} includes {name}"


def test_the_check_sees_a_breach(tmp_path):
    (tmp_path / "a.cc").write_text('#include "worker/train.h"\n#  include <torch/torch.h>\n// #include <mpi.h>\n')
    names = includes(tmp_path / "a.cc")
    assert names == ["worker/train.h", "torch/torch.h"]
    assert re.match(TORCH, names[1]) and any(re.match(pattern, names[0]) for pattern in FORBIDDEN["coordinator"])


def test_own_headers_are_included_by_their_full_path():
    for folder in ("common", "coordinator", "simpoctl", "worker"):
        for path in sources(folder):
            for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
                is_ours = re.match(r"(common|coordinator|simpoctl|worker)/", name)
                assert not is_ours or (ROOT / name).exists(), f"{path.relative_to(ROOT)} includes {name}: no such file"
                assert not (path.parent / name).exists() or (ROOT / name).exists(), \
                    f"{path.relative_to(ROOT)} includes {name} by a relative path"


def test_the_commands_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"make ([a-z]+)", text)) - {"it"}
    assert {"build", "test"} <= targets
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True,
                              env={"PATH": os.environ["PATH"]})
        assert done.returncode == 0, f"make {target}: {done.stderr}"
    presets = (ROOT / "CMakePresets.json").read_text()
    for preset in re.findall(r"--preset (\w[\w-]*)", text):
        assert f'"name": "{preset}"' in presets, preset
    for path in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).exists(), f"CONTRIBUTING.md links to {path}"


def test_every_planted_mistake_has_its_place():
    """`make mutants` is not part of `make test`; a change that moves the place of a mutant is seen here."""
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests/parity/mutants.py")
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    for name, (path, there, instead) in mutants.MUTANTS.items():
        assert (ROOT / path).read_text().count(there) == 1, f"mutant '{name}': {path} does not hold {there!r} once"
        assert there != instead
