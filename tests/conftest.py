"""Settings of every suite: one that ran no test has failed, skipped tests or not."""

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--regen-golden`: write the stored numbers anew instead of comparing with them."""
    parser.addoption("--regen-golden", action="store_true", help="rewrite tests/golden/*.json")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a green run in which nothing ran into pytest's exit code for that."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly or exitstatus != pytest.ExitCode.OK:
        return
    if not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture
def regen_golden(request: pytest.FixtureRequest) -> bool:
    """Tell whether stored numbers are written anew."""
    return bool(request.config.getoption("--regen-golden"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_tracking() -> None:
    """Runs that tests start log to W&B only where the test asks for it."""
    os.environ["WANDB_MODE"] = "disabled"
