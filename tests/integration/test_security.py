"""TLS, client certificates, tokens and allowed roots with the real programs; the table of docs/security.md."""

import json
import pathlib
import re
import subprocess

import pytest

import programs

ROOT = pathlib.Path(__file__).resolve().parents[2]


def openssl(*args):
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path):
    """A function that makes NAME.pem and NAME.key; ca.pem signs them."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", folder / "ca.key", "-out", folder / "ca.pem", "-subj", "/CN=ca",
            "-days", "2")

    def make(name, alternative):
        openssl("req", *new_key, "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.csr", "-subj",
                f"/CN={name}")
        (folder / "extensions").write_text(f"subjectAltName={alternative}\n")
        openssl("x509", "-req", "-in", folder / f"{name}.csr", "-CA", folder / "ca.pem", "-CAkey", folder / "ca.key",
                "-CAcreateserial", "-days", "2", "-out", folder / f"{name}.pem", "-extfile", folder / "extensions")
        return folder
    return make


def new_token(data_dir, role, user, *more):
    command = [programs.program("simpo-coordinator"), "token", "create", "--data-dir", data_dir, "--role", role,
               "--user", user, *more]
    return programs.run_program(command).expect(0).stdout.strip()


def tls_flags(folder):
    return {"tls-cert": folder / "server.pem", "tls-key": folder / "server.key", "tls-ca": folder / "ca.pem",
            "tls-client-ca": folder / "ca.pem"}


def test_a_job_from_submit_to_model_with_everything_on(workspace, coordinators, certificates, tmp_path):
    workspace.make(rows=24)
    # The certificate does not name this machine's address: ranks and simpoctl check it by its name.
    folder = certificates("server", "DNS:train.example")
    certificates("sam", "DNS:sam")
    token = new_token(coordinators.data_dir(), "submit", "sam")
    coordinator = coordinators.start(**tls_flags(folder), **{"allowed-roots": workspace.folder})
    tls = {"SIMPO_CA": str(folder / "ca.pem"), "SIMPO_TLS_NAME": "train.example"}
    mine = {"SIMPO_CERT": str(folder / "sam.pem"), "SIMPO_KEY": str(folder / "sam.key")}

    def ctl(*args, env):
        environment = {"SIMPO_ADDRESS": coordinator.grpc, "NO_COLOR": "1", **env}
        return programs.run_program([programs.program("simpoctl"), *args], env=environment)

    job = workspace.job(max_steps=3)
    assert ctl("list", env={}).code == 1
    assert "SIMPO_CERT" in ctl("list", env=tls).expect(4).stderr
    assert "SIMPO_TOKEN" in ctl("list", env=tls | mine).expect(4).stderr
    everything = tls | mine | {"SIMPO_TOKEN": token}
    escape = ctl("submit", workspace.job("escape", dataset_mixer={"/etc/passwd": 1.0}), env=everything).expect(2)
    assert "allowed_roots" in escape.stderr
    job_id = ctl("submit", job, "-o", "name", env=everything).expect(0).stdout.strip()
    done = ctl("wait", job_id, env=everything)
    assert done.code == 0, f"{done}\n{coordinator.log.read_text()}"
    described = json.loads(ctl("get", job_id, "-o", "json", env=everything).expect(0).stdout)
    assert described["user"] == "sam" and described["progress"]["step"] == 3, described
    def audit(name):
        lines = [json.loads(line) for line in (coordinator.data_dir / name).read_text().splitlines()]
        return [(line["user"], line["method"], line["outcome"]) for line in lines]
    assert audit("audit.jsonl") == [("sam", "SubmitJob", "OK")]
    assert audit("audit-refused.jsonl") == [("", "ListJobs", "UNAUTHENTICATED"), ("sam", "ListJobs", "UNAUTHENTICATED"),
                                            ("sam", "SubmitJob", "INVALID_ARGUMENT")]


def test_a_gang_goes_on_when_tls_is_turned_on(workspace, coordinators, certificates):
    workspace.make(rows=24)
    folder = certificates("server", "DNS:localhost,IP:127.0.0.1")
    first = coordinators.start()
    job_id = first.submit(workspace.job(max_steps=400, lr_scheduler_type="constant", learning_rate=1e-5))
    first.wait_step(job_id, 1)
    first.kill()
    flags = tls_flags(folder)
    del flags["tls-client-ca"]
    second = coordinators.start(**flags)
    ctl = lambda *args: programs.run_program(  # noqa: E731
        [programs.program("simpoctl"), *args], env={"SIMPO_ADDRESS": second.grpc, "SIMPO_CA": str(folder / "ca.pem")})
    before = json.loads(ctl("get", job_id, "-o", "json").expect(0).stdout)["progress"]["step"]

    def grown():
        job = json.loads(ctl("get", job_id, "-o", "json").expect(0).stdout)
        return job["attempt"] == 1 and (job["progress"]["step"] > before or job["state"] == "SUCCEEDED")
    programs.wait_for("steps reported over TLS", grown)
    ctl("cancel", job_id, "--yes").expect(0)
    ctl("wait", job_id)


def test_token_commands(tmp_path):
    data_dir = tmp_path / "data"
    program = programs.program("simpo-coordinator")
    assert "no data folder" in programs.run_program([program, "token", "list", "--data-dir", data_dir]).expect(1).stderr
    data_dir.mkdir()
    assert "There are no tokens" in programs.run_program([program, "token", "list", "--data-dir", data_dir]).stderr
    token = new_token(data_dir, "read", "rita", "--days", "3")
    assert re.fullmatch(r"simpo_[0-9a-f]{8}_[0-9a-f]{64}", token)
    listed = programs.run_program([program, "token", "list", "--data-dir", data_dir]).expect(0).stdout
    assert "rita" in listed and token.split("_")[1] in listed and token.split("_")[2] not in listed
    revoke = [program, "token", "revoke", token.split("_")[1], "--data-dir", data_dir]
    programs.run_program(revoke).expect(0)
    assert "no token" in programs.run_program(revoke).expect(1).stderr
    for wrong in (["create", "--role", "king", "--user", "a"], ["create", "--role", "read"], [],
                  ["create", "--role", "read", "--user", "a\nb"]):
        assert programs.run_program([program, "token", *wrong, "--data-dir", data_dir]).code == 2, wrong


def test_every_row_of_the_security_table_is_a_test():
    text = (ROOT / "docs/security.md").read_text()
    rows = [line for line in text.split("## Threats")[1].split("## What is not")[0].splitlines()
            if line.startswith("|") and not line.startswith(("|--", "| who"))]
    assert len(rows) >= 15
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*/*_test.cc"))
    for row in rows:
        named = re.findall(r"`(\w+)\.(\w+)`", row)
        assert named, row
        for suite, name in named:
            assert re.search(rf"TEST(_F)?\({suite}, {name}\)", sources), f"{suite}.{name} is not there: {row}"
