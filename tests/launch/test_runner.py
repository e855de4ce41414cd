"""A plan that is run, against programs that only say what they are told to."""

import pytest

from rlhf_jax.errors import CRASHED, DONE, MISTAKE, PREEMPTED, UserError
from rlhf_jax.launch import runner
from rlhf_jax.launch.backoff import pause
from rlhf_jax.launch.plan import File, Plan, Step, Watch
from rlhf_jax.launch.runner import Runner
from tests.launch.fakes import tools  # noqa: F401

LOOKS = 3  # in the place of ten


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(runner, "GRACE", LOOKS)
    monkeypatch.setattr(runner, "UNREADABLE", LOOKS)


CREATE, DELETE = Step("make", ("cloud", "create"), attempts=3), Step("delete", ("cloud", "delete"))
STATE, OUTCOMES = ("cloud", "state"), ("cloud", "outcome")
WATCH = Watch(STATE, lost=("GONE",), failed=("FAILED",), processes=2, recover=(DELETE, CREATE), seconds=30.0)
NONE = (1, "")


def run(plan):
    """(exit code, pauses, lines said)."""
    pauses, said = [], []
    return Runner(plan, said.append, pauses.append).run(), pauses, said


def watched(**changes):
    return Plan(**{"title": "t", "files": (), "steps": (CREATE,), "watch": WATCH, "outcomes": OUTCOMES, "clean_up": (DELETE,), "crashes": 1,
                   "preemptions": 2, **changes})


def words(tools, name="cloud"):  # noqa: F811
    return [call[0] for call in tools.calls(name) if call[0] not in ("state", "outcome")]


def test_pauses_grow_and_are_capped():
    assert [pause(n) for n in range(1, 9)] == [5, 10, 20, 40, 80, 160, 300, 300]
    assert pause(10_000) == 300


def test_a_run_is_watched_to_its_end_and_cleaned_up(tools):  # noqa: F811
    tools.add("cloud", (("state",), [NONE, (0, "QUEUED"), (0, "ACTIVE")]), (("outcome",), [NONE, NONE, (0, "h0 0"), (0, "h0 0\nh1 0")]))
    code, pauses, said = run(watched())
    assert code == DONE and pauses == [30.0] * 4
    assert words(tools) == ["create", "delete"]
    assert [line for line in said if line.startswith("state:")] == ["state: QUEUED", "state: ACTIVE"]


def test_a_command_is_tried_again_with_growing_pauses(tools):  # noqa: F811
    tools.add("cloud", (("create",), [(1, ""), (1, ""), (0, "")]), (("state",), [NONE, (0, "ACTIVE")]), (("outcome",), [(0, "h0 0\nh1 0")]))
    code, pauses, _ = run(watched())
    assert code == DONE and pauses == [5, 10, 30.0]
    assert words(tools) == ["create"] * 3 + ["delete"]


def test_machines_that_were_never_had_are_not_deleted(tools):  # noqa: F811
    tools.add("cloud", (("create",), [(1, "")]), (("state",), [NONE]))
    code, pauses, _ = run(watched())
    assert code == CRASHED and pauses == [5, 10] and words(tools) == ["create"] * 3


def test_a_wrong_argument_is_a_mistake_and_not_tried_again(tools):  # noqa: F811
    tools.add("cloud", (("create",), [(2, "")]), (("state",), [NONE]))
    code, pauses, _ = run(watched())
    assert code == MISTAKE and pauses == [] and words(tools) == ["create"]


def test_preempted_machines_are_replaced_and_the_run_goes_on(tools):  # noqa: F811
    states = [NONE, (0, "ACTIVE"), (0, "GONE"), (0, "ACTIVE"), (0, "GONE"), (0, "ACTIVE")]
    tools.add("cloud", (("state",), states), (("outcome",), [NONE] * 5 + [(0, "h0 0\nh1 0")]))
    code, pauses, _ = run(watched())
    assert code == DONE
    assert words(tools) == ["create"] + ["delete", "create"] * 2 + ["delete"]
    assert [one for one in pauses if one != 30.0] == [5, 10]


def test_preempted_too_often(tools):  # noqa: F811
    tools.add("cloud", (("state",), [NONE, (0, "GONE")]), (("outcome",), [NONE]))
    code, _, said = run(watched())
    assert code == PREEMPTED and words(tools) == ["create"] + ["delete", "create"] * 2 + ["delete"]
    assert "same command goes on" in said[-1]


def test_machines_that_cannot_be_had(tools):  # noqa: F811
    tools.add("cloud", (("state",), [NONE, (0, "FAILED")]), (("outcome",), [NONE]))
    assert run(watched())[0] == CRASHED
    assert words(tools) == ["create", "delete", "create", "delete"]


@pytest.mark.parametrize(("rows", "code"), [("h0 2", MISTAKE), ("h0 0\nh1 1", CRASHED), ("h0 1\nh1 2", MISTAKE)])
def test_one_outcome_that_is_bad_ends_it(tools, rows, code):  # noqa: F811
    tools.add("cloud", (("state",), [NONE, (0, "ACTIVE")]), (("outcome",), [(0, rows)]))
    assert run(watched())[0] == code
    assert words(tools) == ["create", "delete"]


def test_a_process_that_never_reports_is_not_waited_for_for_ever(tools):  # noqa: F811
    tools.add("cloud", (("state",), [NONE, (0, "ACTIVE")]), (("outcome",), [(0, "h0 0")]))
    code, pauses, _ = run(watched())
    assert code == DONE and len(pauses) == LOOKS + 1


def test_a_state_that_cannot_be_read_ends_the_watch(tools):  # noqa: F811
    tools.add("cloud", (("state",), [NONE]), (("outcome",), [NONE]))
    code, pauses, _ = run(watched())
    assert code == CRASHED and len(pauses) == LOOKS and words(tools) == ["create", "delete"]


def test_machines_that_are_there_are_watched_and_not_made_twice(tools):  # noqa: F811
    tools.add("cloud", (("state",), [(0, "ACTIVE")]), (("outcome",), [(0, "h0 0\nh1 0")]))
    assert run(watched())[0] == DONE and words(tools) == ["delete"]


def test_what_an_earlier_launch_lost_is_replaced(tools):  # noqa: F811
    tools.add("cloud", (("state",), [(0, "GONE"), (0, "ACTIVE")]), (("outcome",), [(0, "h0 0\nh1 0")]))
    tools.add("ship")
    assert run(watched(steps=(Step("ship", ("ship", "it")), CREATE)))[0] == DONE
    assert words(tools) == ["delete", "create", "delete"] and tools.calls("ship") == [["it"]]


def test_a_clean_up_that_fails_is_said(tools):  # noqa: F811
    tools.add("cloud", (("state",), [NONE, (0, "ACTIVE")]), (("outcome",), [(0, "h0 0\nh1 0")]), (("delete",), [(1, "")]))
    code, pauses, said = run(watched())
    assert code == DONE and pauses == [30.0, 5, 10, 20]
    assert any("machines are left" in line for line in said)


@pytest.mark.parametrize(("waited", "rows", "code"),
                         [(0, "h0 0", DONE), (1, "h0 0", DONE), (125, "h0 2", MISTAKE), (0, "", DONE), (1, "", CRASHED), (0, "h0 1", CRASHED)])
def test_a_backend_that_restarts_by_itself_is_waited_for(tools, waited, rows, code):  # noqa: F811
    tools.add("cloud", (("wait",), [(waited, "")]), (("outcome",), [(0, rows)]))
    assert run(watched(watch=None, wait=Step("wait", ("cloud", "wait"), attempts=1), clean_up=()))[0] == code
    assert words(tools) == ["create", "wait"]


def test_a_step_that_may_fail(tools):  # noqa: F811
    tools.add("cloud", (("try",), [(1, "")]))
    code, pauses, _ = run(Plan("t", (), (Step("try", ("cloud", "try"), attempts=1, may_fail=True), Step("go", ("cloud", "go")))))
    assert code == DONE and pauses == [] and words(tools) == ["try", "go"]


def test_files_are_written_and_old_ones_of_the_job_go(tools, tmp_path):  # noqa: F811
    (tmp_path / "plan" / "job").mkdir(parents=True)
    (tmp_path / "plan" / "job" / "code.tar.gz").write_text("of an earlier launch")
    tools.add("cloud")
    run(Plan("t", (File(f"{tmp_path}/plan/job/job.json", "{}"), File(f"{tmp_path}/plan/startup.sh", "x")), (Step("go", ("cloud", "go")),)))
    assert sorted(path.name for path in (tmp_path / "plan").rglob("*")) == ["job", "job.json", "startup.sh"]


def test_a_tool_that_is_missing_is_named_before_anything_is_done(tools):  # noqa: F811
    tools.add("cloud")
    with pytest.raises(UserError, match="no-such-tool is not installed"):
        run(Plan("t", (), (CREATE, Step("x", ("no-such-tool",)))))
    assert tools.calls("cloud") == []
