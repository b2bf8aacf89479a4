"""Fixtures of the integration tests. ctest sets SIMPO_BIN_DIR to the folder of the built programs."""

import json
import os
import pathlib

import pytest

import preference_data
import programs
import tiny_model


# Of what takes minutes, ctest runs a part; `make faults` runs all of it.
long = pytest.mark.skipif(not os.environ.get("SIMPO_LONG_TESTS"), reason="long: make faults runs it")


class Workspace:
    """A folder with a model, data and job files."""

    def __init__(self, folder):
        self.folder = folder
        self.model = folder / "model"
        self.train = folder / "train.jsonl"
        self.cache = folder / "cache"

    def make(self, rows=24, seed=0, words=4, messages=False, **model):
        """The default model and data."""
        tiny_model.write_model(self.model, **model)
        self.make_data(rows, seed, words, messages)
        return self

    def make_data(self, rows=24, seed=0, words=4, messages=False):
        make_rows = preference_data.message_rows if messages else preference_data.text_rows
        preference_data.write_jsonl(self.train, make_rows(rows, seed, words))

    def job(self, name="job", /, **changes):
        """A job file of the workspace, one key a line; a value of None leaves the key out."""
        values = {
            "model_name_or_path": str(self.model),
            "dataset_mixer": {str(self.train): 1.0},
            "output_dir": str(self.output(name)),
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "global_batch_size": 8,
            "max_length": 256,
            "resources": {"ranks_per_node": 2, "threads_per_rank": 1},
        }
        values.update(changes)
        path = self.folder / f"{name}.yaml"
        lines = [f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value is not None]
        path.write_text("".join(lines))
        return path

    def output(self, name="job"):
        return self.folder / f"out-{name}"

    def start_worker(self, job, ranks=2, args=()):
        return programs.WorkerRun(job, self.cache, ranks, args)

    def run_worker(self, job, ranks=2, args=()):
        return self.start_worker(job, ranks, args).finish()

    def metrics(self, name="job"):
        return preference_data.read_jsonl(self.output(name) / "metrics.jsonl")

    def eval_metrics(self, name="job"):
        return preference_data.read_jsonl(self.output(name) / "eval_metrics.jsonl")


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


@pytest.fixture
def coordinators(tmp_path):
    """Starts coordinators on data directories of the test; none, and no gang of theirs, outlives it."""
    import servers
    group = servers.Coordinators(tmp_path)
    yield group
    group.end()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows the logs of everything that the test ran."""
    outcome = yield
    report = outcome.get_result()
    folder = item.funcargs.get("tmp_path") if hasattr(item, "funcargs") else None
    if report.when != "call" or not report.failed or folder is None:
        return
    for log in sorted(pathlib.Path(folder).rglob("*.log")):
        text = log.read_text(errors="replace")
        if text:
            report.sections.append((str(log.relative_to(folder)), text[-5000:]))
