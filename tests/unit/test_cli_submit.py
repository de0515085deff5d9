"""What `ops train`, `run` and `submit` send, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops
from ops_cli.exits import ExitCode
from ops_contract.jobs import CheckpointEvery, Job, JobSpec
from ops_contract.lifecycle import Status

__all__ = ["api", "ops"]  # fixtures


def test_train_sends_what_was_typed_and_no_default(api: Api, ops: Ops) -> None:
    ran = ops(
        *("train", "digits", "--set", "config.width=64", "--set", "config.name=wide", "--set", "execution.seed=7"),
        *("--max-epochs", 3, "--checkpoint-every", "20steps", "--label", "team=a", "--learning-rate", "1e-2"),
    )

    assert ran.code == ExitCode.DONE
    assert "ops watch" in ran.out
    assert api.submitted == [
        {
            "workload": "digits",
            "config": {"width": 64, "name": "wide"},
            "execution": {"seed": 7, "max_epochs": 3, "checkpoint_every": {"steps": 20}, "learning_rate": 0.01},
            "labels": {"team": "a"},
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "width=64"], "config.NAME=VALUE"),
        (["--set", "config.width"], "config.NAME=VALUE"),
        (["--set", "execution.max_epochs=0"], "execution.max_epochs"),
        (["--max-epochs", "3", "--set", "execution.max_epochs=4"], "twice"),
        (["--checkpoint-every", "20"], "200steps"),
        (["--checkpoint-every", "sometimes"], "auto"),
        (["--set", "execution.checkpoint_every=sometimes"], "execution.checkpoint_every"),
        (["--label", "team"], "KEY=VALUE"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_mistyped_job_is_a_usage_error_that_says_how(api: Api, ops: Ops, arguments: list[str], words: str) -> None:
    ran = ops("train", "digits", *arguments)

    assert ran.code == ExitCode.USAGE
    assert words in ran.err
    assert not api.submitted


@pytest.mark.parametrize(
    ("period", "sent"), [("auto", "auto"), ("30seconds", {"seconds": 30}), ("1epoch", {"epochs": 1})]
)
def test_a_period_is_a_number_of_something_or_auto(api: Api, ops: Ops, period: str, sent: Any) -> None:
    assert ops("train", "digits", "--checkpoint-every", period, "--set", "execution.precision=16").code == ExitCode.DONE

    assert JobSpec.model_validate(api.submitted[0]).execution.precision == "16"
    assert api.submitted[0]["execution"]["checkpoint_every"] == sent


@pytest.mark.parametrize(
    "text",
    [
        '{"workload": "digits", "config": {"rate": 1e-3}, "execution": {"checkpoint_every": {"epochs": 1}}}',
        "workload: digits\nconfig: {rate: 1e-3}\nexecution:\n  checkpoint_every: {epochs: 1}\n",
    ],
)
def test_a_file_is_yaml_or_json(api: Api, ops: Ops, tmp_path: Path, text: str) -> None:
    (tmp_path / "job").write_text(text)

    assert ops("submit", tmp_path / "job").code == ExitCode.DONE

    [sent] = api.submitted
    assert sent["config"] == {"rate": 0.001}
    assert JobSpec.model_validate(sent).execution.checkpoint_every == CheckpointEvery(epochs=1)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "neither YAML"), ("- a", "workload: NAME"), ("workload: 3", "workload:")]
)
def test_a_file_that_is_no_job_is_refused(api: Api, ops: Ops, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "job.yaml").write_text(text)

    ran = ops("submit", tmp_path / "job.yaml")

    assert ran.code == ExitCode.USAGE
    assert words in ran.err


def test_run_submits_the_command_as_it_was_typed_with_all_that_it_asks_for(
    api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_SHELL", "a=b")
    options = ("--env", "A=1=2", "--env", "FROM_SHELL", "--secret", "HF_TOKEN", "--artifact", "out/**", "--cores", "2")
    more = ("--workdir", "sub", "--name", "n", "--label", "a=b", "--priority", "5", "--max-retries", "0", "--no-code")

    assert ops("run", *options, *more, "--", "python", "train.py", "--lr", "3e-4", "--name", "x").code == ExitCode.DONE
    assert ops("run", "--no-code", "sh", "-c", "exit 1", "--watch").code == ExitCode.DONE

    full, bare = api.submitted
    assert full == {
        "command": ["python", "train.py", "--lr", "3e-4", "--name", "x"],
        "kind": "command",
        "env": {"A": "1=2", "FROM_SHELL": "a=b"},
        "secrets": ["HF_TOKEN"],
        "artifacts": ["out/**"],
        "workdir": "sub",
        "resources": {"cores": 2},
        "name": "n",
        "labels": {"a": "b"},
        "priority": 5,
        "max_retries": 0,
    }
    assert bare == {"command": ["sh", "-c", "exit 1", "--watch"], "kind": "command"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--env", "NOT_IN_THIS_SHELL", "true"), "this shell has no such variable"),
        (("--env", "OPS_API_TOKEN=x", "true"), "names that begin with OPS_ or RELIGHT_"),
        (("--env", "A=1", "--secret", "A", "true"), "env and secrets both name A"),
        (("--artifact", "../x", "true"), "give a relative path"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused_before_anything_is_sent(
    api: Api, ops: Ops, arguments: tuple[str, ...], says: str
) -> None:
    ran = ops("run", *arguments)

    assert ran.code == ExitCode.USAGE
    assert says in " ".join((ran.err + ran.out).split())
    assert api.submitted == []


def test_set_goes_over_the_file_and_keeps_texts_as_texts(api: Api, ops: Ops, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("workload: digits\nexecution: {checkpoint_every: {epochs: 1}, seed: 1}\n")
    settings = ('execution.checkpoint_every={"steps": 5}', "env.PORT=8080", "labels.run.no=7", "name=3")

    assert ops("submit", tmp_path / "job.yaml", *(f"--set={each}" for each in settings)).code == ExitCode.DONE

    assert api.submitted == [
        {
            "workload": "digits",
            "execution": {"checkpoint_every": {"steps": 5}, "seed": 1},
            "env": {"PORT": "8080"},
            "labels": {"run.no": "7"},
            "name": "3",
        }
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("workload: digits\nexecution: {learning_rat: 1}\n", "did you mean learning_rate?"),
        ("workload: digits\nmax_epochs: 3\n", "did you mean execution.max_epochs?"),
        ("workload: digits\nresources: {cors: 3}\n", "did you mean cores?"),
        ("workload: digits\nxyzzy: 3\n", "there are command, code"),
    ],
)
def test_an_unknown_field_names_the_one_that_was_meant(
    api: Api, ops: Ops, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "job.yaml").write_text(text)

    ran = ops("submit", tmp_path / "job.yaml")

    assert (ran.code, api.submitted) == (ExitCode.USAGE, [])
    assert words in ran.err


def test_a_wrong_override_of_a_fork_is_refused_before_it_is_sent(api: Api, ops: Ops) -> None:
    ran = ops("fork", api.holds(operation()), "--set", "workdir=x")

    assert (ran.code, api.forked) == (ExitCode.USAGE, [])
    assert "workdir: no such field" in ran.err


def test_a_dry_run_prints_the_resolved_job_and_stores_nothing(api: Api, ops: Ops, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("workload: digits\n")
    parent = api.holds(operation())

    for command in (("submit", tmp_path / "job.yaml"), ("train", "digits"), ("fork", parent)):
        ran = ops(*command, "--dry-run")
        assert ran.code == ExitCode.DONE
        assert Job.model_validate(yaml.safe_load(ran.out)) == operation().job
    assert (api.submitted, api.forked) == ([], [])


def test_the_schema_of_a_job_file_takes_what_the_job_takes(ops: Ops) -> None:
    schema = json.loads(ops("schema").out)
    valid = jsonschema.Draft202012Validator(schema).is_valid

    assert valid({"workload": "digits", "execution": {"precision": 16, "checkpoint_every": {"steps": 2}}})
    assert valid({"command": ["python", "train.py"], "env": {"A": "1"}, "secrets": ["B"]})
    assert not valid({"workload": "digits", "max_epochs": 3})
    assert not valid({"name": "nothing to run"})


def test_the_failure_that_ends_an_operation_uses_no_retry(api: Api, ops: Ops) -> None:
    ran = ops("status", api.holds(operation(status=Status.FAILED, attempt=3, failures=3, max_retries=2)))
    assert "3, 2 of 2 retries used" in ran.out
