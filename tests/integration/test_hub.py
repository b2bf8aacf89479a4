"""Models and data sets of the hub, from a server on this machine: what is fetched, the cache's layout, faults of
the connection, refusals, and work without a network."""

import hashlib
import json
import os
import pathlib
import random
import re
import ssl
import subprocess

import pytest

import preference_data
import programs
import tiny_model
from hub_server import GOOD_TOKEN, Fault, Hub, git_sha1

BAD_INPUT, TRY_AGAIN = 3, 75
MODEL, DATA = "org/tiny", "org/pairs"
WEIGHTS = "model.safetensors"


class HubWorkspace:
    """A hub with a model and a data set, and a job that names both."""

    def __init__(self, folder, hub):
        self.folder, self.hub, self.home = folder, hub, folder / "hf"
        self.files = self.model_files("plain")
        self.rows, self.more_rows = (
            "".join(json.dumps(row) + "\n" for row in preference_data.text_rows(count, seed=count)).encode()
            for count in (12, 5))
        self.commit = hub.add("model", MODEL, self.files)
        hub.add("dataset", DATA, {"README.md": b"# pairs", "train.jsonl": self.rows, "test.jsonl": self.more_rows})

    def model_files(self, name, **model):
        """A model folder as a repository has it, with what must not be fetched beside it."""
        tiny_model.write_model(self.folder / "origin" / name, **model)
        files = {path.name: path.read_bytes() for path in (self.folder / "origin" / name).iterdir()}
        return {**files, "README.md": b"# tiny", ".gitattributes": b"", "pytorch_model.bin": b"pickle",
                "original/consolidated.safetensors": b"no", "onnx/model.onnx": b"no"}

    def job(self, name="job", **changes):
        values = {"model_name_or_path": MODEL, "dataset_mixer": {DATA: 1.0}, "max_length": 256, "learning_rate": 1e-2,
                  "global_batch_size": 4, "output_dir": str(self.folder / f"out-{name}"),
                  "resources": {"ranks_per_node": 2, "threads_per_rank": 1}, **changes}
        path = self.folder / f"{name}.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
        return path

    def environment(self, **more):
        env = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.hub.url(), "HOME": str(self.folder),
               "SIMPO_CACHE_DIR": str(self.folder / "cache"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        unset = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE",
                 "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HF_HUB_DOWNLOAD_TIMEOUT")
        return {**env, **{name: "" for name in unset}, **{key: str(value) for key, value in more.items()}}

    def prepare(self, job=None, /, **env):
        return programs.run_program([programs.program("simpo-worker"), "prepare", "--job", job or self.job()],
                                    env=self.environment(**env))

    def start_prepare(self, **env):
        return subprocess.Popen([programs.program("simpo-worker"), "prepare", "--job", str(self.job())],
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                env=dict(os.environ, **self.environment(**env)))

    def repo_folder(self, kind="models", repo=MODEL):
        return self.home / "hub" / f"{kind}--{repo.replace('/', '--')}"

    def snapshot(self):
        return self.repo_folder() / "snapshots" / self.commit

    def partials(self):
        return [path for path in self.home.rglob("*.incomplete")]

    def fetched(self):
        """Paths of the model and data whose content the servers sent."""
        return sorted({path for path in self.hub.requested() if not path.startswith("api/")})


@pytest.fixture
def workspace(tmp_path):
    with Hub() as hub:
        yield HubWorkspace(tmp_path, hub)


def says(result, pattern):
    text = " ".join(result.stderr.split())
    assert re.search(pattern, text), f"no /{pattern}/ in\n{result}"


def test_fetches_only_what_is_needed_into_the_cache_of_huggingface_hub(workspace):
    result = workspace.prepare().expect(0)
    says(result, f"model: {MODEL}, revision main, commit {workspace.commit}")
    says(result, f"data set {DATA}, revision main, commit [0-9a-f]{{40}}: split train")
    needed = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}
    assert set(workspace.fetched()) == needed | {"README.md", "train.jsonl", "test.jsonl"}  # README: the data set's

    folder = workspace.repo_folder()
    assert (folder / "refs/main").read_text() == workspace.commit
    links = {path.name: os.readlink(path) for path in workspace.snapshot().iterdir()}
    expected = {name: f"../../blobs/{git_sha1(workspace.files[name])}" for name in needed}
    expected[WEIGHTS] = f"../../blobs/{hashlib.sha256(workspace.files[WEIGHTS]).hexdigest()}"
    assert links == expected
    for name in needed:
        assert (workspace.snapshot() / name).read_bytes() == workspace.files[name]
    locks = {path.name for path in (workspace.home / "hub/.locks" / folder.name).iterdir()}
    assert locks == {f"{pathlib.Path(target).name}.lock" for target in expected.values()}
    assert workspace.partials() == []

    workspace.hub.exchanges.clear()
    workspace.prepare().expect(0)
    assert workspace.fetched() == [], "nothing is fetched twice"


def test_config_is_checked_before_weights_are_fetched(workspace):
    config = json.loads(workspace.files["config.json"])
    workspace.files["config.json"] = json.dumps({**config, "model_type": "mamba"}).encode()
    result = workspace.prepare().expect(BAD_INPUT)
    says(result, "mamba")
    assert WEIGHTS not in workspace.fetched() and "tokenizer.json" not in workspace.fetched()


def test_cut_connections_go_on_where_they_stopped(workspace):
    size = len(workspace.files[WEIGHTS])
    cuts = [Fault(cut_after=random.Random(seed).randrange(1, size // 8)) for seed in range(8)]
    workspace.hub.faults[WEIGHTS] = cuts + [Fault(cut_after=0)]
    result = workspace.prepare().expect(0)
    says(result, f"{WEIGHTS}: the connection .*; trying again in")
    assert (workspace.snapshot() / WEIGHTS).read_bytes() == workspace.files[WEIGHTS]
    assert workspace.hub.bytes_sent(WEIGHTS) == size, "every byte was sent once"
    ranges = [e.headers.get("range") for e in workspace.hub.exchanges if e.server == "storage"]
    assert ranges[0] is None and ranges[1] == f"bytes={cuts[0].cut_after}-"


def test_a_killed_download_goes_on_in_the_next_process(workspace):
    workspace.hub.faults[WEIGHTS] = [Fault(stall_after=20000)]
    process = workspace.start_prepare()
    programs.wait_for("a part of the weights", lambda: any(p.stat().st_size == 20000 for p in workspace.partials()))
    process.kill()
    process.communicate()
    result = workspace.prepare().expect(0)
    says(result, f"{WEIGHTS}: going on after 20.0 kB")
    assert workspace.hub.bytes_sent(WEIGHTS) == len(workspace.files[WEIGHTS])


def test_a_silent_server_is_left_after_the_timeout(workspace):
    workspace.hub.faults[WEIGHTS] = [Fault(stall_after=5000)]
    result = workspace.prepare(HF_HUB_DOWNLOAD_TIMEOUT=1).expect(0)
    says(result, f"{WEIGHTS}: the connection was lost .*; trying again")
    assert workspace.hub.bytes_sent(WEIGHTS) == len(workspace.files[WEIGHTS])


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_flipped_bit_is_found_and_the_file_fetched_again(workspace, name):
    workspace.hub.faults[name] = [Fault(flip=1000)]
    says(workspace.prepare().expect(0), f"{name}: wrong checksum.*deleted; downloading it again")
    assert (workspace.snapshot() / name).read_bytes() == workspace.files[name]


def test_a_lasting_wrong_checksum_ends_the_job(workspace):
    workspace.hub.faults[WEIGHTS] = [Fault(flip=1000)] * 2
    says(workspace.prepare().expect(BAD_INPUT), f"file {WEIGHTS}: wrong checksum: [0-9a-f]{{64}} instead of .*deleted")
    assert workspace.partials() == [] and not (workspace.snapshot() / WEIGHTS).exists()


@pytest.mark.parametrize("fault", [
    Fault(extra=7), Fault(extra=-7), Fault(status=503), Fault(status=429, headers={"Retry-After": "1"}),
    Fault(status=403),  # of the storage: the address has expired
], ids=["longer", "shorter", "503", "429", "expired"])
def test_passing_faults_are_tried_again(workspace, fault):
    workspace.hub.faults[WEIGHTS] = [fault]
    workspace.hub.faults["api"] = [Fault(status=502)]
    says(workspace.prepare().expect(0), "trying again in")
    assert (workspace.snapshot() / WEIGHTS).read_bytes() == workspace.files[WEIGHTS]


def test_a_server_without_ranges_starts_over(workspace):
    workspace.hub.faults[WEIGHTS] = [Fault(cut_after=9000), Fault(ignore_range=True)]
    workspace.prepare().expect(0)
    assert workspace.hub.bytes_sent(WEIGHTS) == 9000 + len(workspace.files[WEIGHTS])


def test_a_server_that_stays_away(workspace):
    workspace.hub.faults[WEIGHTS] = [Fault(cut_after=3000)] + [Fault(status=503)] * 10
    says(workspace.prepare().expect(TRY_AGAIN), f"file {WEIGHTS}: .*503.*What was received is kept")
    assert [path.stat().st_size for path in workspace.partials()] == [3000]


def test_a_full_disk_is_named(workspace):
    blobs = workspace.repo_folder() / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(workspace.files[WEIGHTS]).hexdigest()}.incomplete").symlink_to("/dev/full")
    says(workspace.prepare().expect(TRY_AGAIN), "cannot write .*incomplete: No space left .*HF_HOME")


def test_the_token_goes_to_the_hub_alone_and_is_never_shown(workspace):
    workspace.hub.repositories[f"models/{MODEL}"].gated = True
    result = workspace.prepare(HF_TOKEN=GOOD_TOKEN).expect(0)
    assert GOOD_TOKEN not in str(result)
    tokens = {name: {e.headers.get("authorization") for e in workspace.hub.exchanges if e.server == name}
              for name in ("hub", "storage")}
    assert tokens == {"hub": {f"Bearer {GOOD_TOKEN}"}, "storage": {None}}


def test_the_token_file_is_read(workspace):
    workspace.hub.repositories[f"models/{MODEL}"].private = True
    workspace.home.mkdir()
    (workspace.home / "token").write_text(GOOD_TOKEN + "\n")
    workspace.prepare().expect(0)


@pytest.mark.parametrize("token", ["", "hf_other"])
def test_a_gated_model_names_its_licence_page(workspace, token):
    workspace.hub.repositories[f"models/{MODEL}"].gated = True
    result = workspace.prepare(HF_TOKEN=token).expect(BAD_INPUT)
    says(result, f"is gated.*accept its licence on {workspace.hub.url()}/{MODEL} .*HF_TOKEN or run `hf auth login`")
    assert not token or token not in str(result)


def test_a_token_that_is_not_accepted(workspace):
    result = workspace.prepare(HF_TOKEN="wrong").expect(BAD_INPUT)
    says(result, "does not accept the given token")
    assert "wrong" not in str(result)


@pytest.mark.parametrize("token", ["", "hf_other"])
def test_a_name_that_is_neither_folder_nor_repository(workspace, token):
    result = workspace.prepare(workspace.job(model_name_or_path="org/tinny"), HF_TOKEN=token).expect(BAD_INPUT)
    says(result, "model_name_or_path: 'org/tinny' is not a folder on .*there is no model org/tinny on .*misspelt.*private")
    result = workspace.prepare(workspace.job(dataset_mixer={"org/pears": 1.0}), HF_TOKEN=token).expect(BAD_INPUT)
    says(result, "'org/pears' is neither a file nor a folder here, and .*no data set org/pears.*misspelt.*private")


def test_revisions(workspace):
    old = workspace.hub.add("model", MODEL, {**workspace.files, "generation_config.json": b"{}"}, revision="v1/old")
    says(workspace.prepare(workspace.job(model_revision="v1/old")).expect(0), f"revision v1/old, commit {old}")
    assert (workspace.repo_folder() / "refs/v1/old").read_text() == old
    workspace.hub.exchanges.clear()
    workspace.prepare(workspace.job(model_revision=old)).expect(0)
    assert not any("models" in path for path in workspace.hub.requested()), "a commit that is there is not asked for"
    result = workspace.prepare(workspace.job(model_revision="v2")).expect(BAD_INPUT)
    says(result, f"has no revision 'v2': see {workspace.hub.url()}/{MODEL}/tree/main")
    says(workspace.prepare(workspace.job(model_revision="../../x")).expect(BAD_INPUT), "is not a revision")


def test_without_network_the_cache_answers(workspace):
    workspace.prepare().expect(0)
    workspace.hub.exchanges.clear()
    workspace.prepare(HF_HUB_OFFLINE=1).expect(0)
    assert workspace.hub.exchanges == []
    workspace.hub.end()
    result = workspace.prepare().expect(0)
    says(result, f"note: model {MODEL}: {workspace.hub.url()} cannot be used .*cached commit {workspace.commit} is used")


def test_offline_names_what_is_missing(workspace):
    result = workspace.prepare(HF_HUB_OFFLINE=1).expect(BAD_INPUT)
    says(result, f"model {MODEL}, revision main: HF_HUB_OFFLINE is set, and it is not in the cache .*`hf download {MODEL}`")
    workspace.prepare().expect(0)
    (workspace.snapshot() / WEIGHTS).unlink()
    result = workspace.prepare(HF_HUB_OFFLINE=1).expect(BAD_INPUT)
    says(result, f"the cache lacks {WEIGHTS} .*`hf download {MODEL} --revision {workspace.commit}`")
    data = next(workspace.repo_folder("datasets", DATA).glob("snapshots/*/train.jsonl"))
    data.unlink()
    workspace.prepare().expect(0)
    data.unlink()
    says(workspace.prepare(HF_HUB_OFFLINE=1).expect(BAD_INPUT), "the cache lacks train.jsonl")
    workspace.hub.end()
    says(workspace.prepare().expect(TRY_AGAIN), "cannot be used .*the cache lacks train.jsonl")


def pickle_only(files):
    return {path: data for path, data in files.items() if not path.endswith(".safetensors")}


def discussion(number, author="SFconvertbot", status="open"):
    return {"num": number, "title": "Adding `safetensors` variant of this model", "status": status,
            "isPullRequest": True, "author": {"name": author}}


def test_pickle_only_takes_the_hubs_own_conversion(workspace):
    workspace.hub.add("model", MODEL, pickle_only(workspace.files))
    repository = workspace.hub.repositories[f"models/{MODEL}"]
    repository.discussions = [discussion(9, author="stranger"), discussion(7), {"num": 3, "title": "Hello"}]
    workspace.commit = workspace.hub.add("model", MODEL, workspace.files, revision="refs/pr/7")
    workspace.hub.add("model", MODEL, {**workspace.files, WEIGHTS: b"evil"}, revision="refs/pr/9")
    pattern = f"only pickle files; the hub's own conversion .*refs/pr/7, commit {workspace.commit}.* pin it"
    says(workspace.prepare().expect(0), pattern)
    assert "pytorch_model.bin" not in workspace.fetched()
    workspace.hub.exchanges.clear()
    says(workspace.prepare(HF_HUB_OFFLINE=1).expect(0), pattern)
    assert workspace.hub.exchanges == []
    workspace.prepare(workspace.job(model_revision=workspace.commit)).expect(0)


def test_pickle_without_conversion_is_refused(workspace):
    workspace.hub.add("model", MODEL, pickle_only(workspace.files))
    says(workspace.prepare().expect(BAD_INPUT), "only pickle files .*spaces/safetensors/convert")
    workspace.hub.repositories[f"models/{MODEL}"].discussions = [discussion(7, status="closed")]
    says(workspace.prepare().expect(BAD_INPUT), "owners closed .*model_revision: refs/pr/7")
    workspace.hub.add("model", MODEL, {"config.json": b"{}", "tiny.gguf": b""})
    says(workspace.prepare().expect(BAD_INPUT), "neither model.safetensors nor .*not a model in the form of transformers")


def test_shards_of_an_index(workspace):
    files = workspace.model_files("sharded", files=3)
    workspace.hub.add("model", MODEL, files)
    workspace.prepare().expect(0)
    assert sum(path.startswith("model-0000") for path in workspace.fetched()) == 3
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.weight"] = "../../../escape.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    result = workspace.prepare().expect(BAD_INPUT)
    says(result, "names '../../../escape.safetensors', which is no safetensors file")


def test_a_local_folder_wins(workspace):
    tiny_model.write_model(workspace.folder / "org" / "tiny")
    preference_data.write_jsonl(workspace.folder / "org" / "pairs" / "train.jsonl", preference_data.text_rows(4))
    result = workspace.prepare().expect(0)
    says(result, f"model: local folder {workspace.folder}/org/tiny")
    says(result, "train data: 4 rows")
    assert workspace.hub.exchanges == []


README = b"""---
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: data/train_prefs-*
  - split: test_prefs
    path: [data/test_prefs-*]
- config_name: other
  data_files:
  - split: train_prefs
    path: other/rows.jsonl
---
# pairs
"""


def test_splits_and_configurations_of_a_data_set(workspace):
    more = workspace.more_rows
    workspace.hub.add("dataset", DATA, {
        "README.md": README, "data/train_prefs-00000-of-00002.jsonl": workspace.rows,
        "data/train_prefs-00001-of-00002.jsonl": more, "data/train_sft-00000-of-00001.jsonl": b"{}",
        "data/test_prefs-00000-of-00001.jsonl": more, "other/rows.jsonl": more})
    result = workspace.prepare(workspace.job(dataset_splits=["train_prefs", "test_prefs"])).expect(0)
    says(result, "train data: 17 rows.*evaluation data: 5 rows")
    assert "data/train_sft-00000-of-00001.jsonl" not in workspace.fetched()
    job = workspace.job(dataset_splits=["train_prefs"], dataset_configs=["other"])
    says(workspace.prepare(job).expect(0), "train data: 5 rows")
    says(workspace.prepare().expect(BAD_INPUT), "no split 'train' among its files .data/train_prefs-00000.*dataset_splits")
    job = workspace.job(dataset_splits=["train_prefs"], dataset_configs=["nil"])
    says(workspace.prepare(job).expect(BAD_INPUT), f"data set {DATA} has no configuration 'nil'.*default, other")


def test_https_with_certificates_of_ones_own(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=hub", "-addext",
                    "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"],
                   check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Hub(context) as hub:
        workspace = HubWorkspace(tmp_path, hub)
        says(workspace.prepare(SSL_CERT_FILE="").expect(TRY_AGAIN), "cannot be used .*certificate")
        workspace.prepare(SSL_CERT_FILE=certificate).expect(0)


def test_two_jobs_at_once_download_once(workspace):
    workspace.hub.faults[WEIGHTS] = [Fault(stall_after=1000)]
    first = workspace.start_prepare(HF_HUB_DOWNLOAD_TIMEOUT=2)
    programs.wait_for("the first job's download", lambda: WEIGHTS in workspace.hub.requested())
    second = workspace.start_prepare(HF_HUB_DOWNLOAD_TIMEOUT=2)
    errors = [process.communicate(timeout=programs.DEADLINE_S)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert "another process is downloading it" in errors[1]
    assert workspace.hub.bytes_sent(WEIGHTS) == len(workspace.files[WEIGHTS])


def test_one_rank_of_a_machine_asks_the_hub(workspace, monkeypatch):
    for name, value in workspace.environment().items():
        monkeypatch.setenv(name, value)
    job = workspace.job(max_steps=1)
    programs.WorkerRun(job, workspace.folder / "cache", ranks=2).finish().expect(0)
    lists = [path for path in workspace.hub.requested() if path.startswith("api/models")]
    assert len(lists) == 1
    assert workspace.hub.bytes_sent(WEIGHTS) == len(workspace.files[WEIGHTS])
    manifest = json.loads((workspace.folder / "out-job/run_manifest.json").read_text())
    assert manifest["model"]["source"] == f"{MODEL}, revision main, commit {workspace.commit}"
    assert any(note.startswith(f"data set {DATA}") for note in manifest["data"]["notes"])
