import logging
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gatewise.moe.config import Activation
from gatewise.moe.ops import build, native
from gatewise.moe.ops.build import build_library
from gatewise.moe.ops.grouped_ffn import ffn_forward


@pytest.fixture(autouse=True)
def _forget_kernels() -> Iterator[None]:
    """Let a test decide what `load_kernels` finds, and the next test look again."""
    native.load_kernels.cache_clear()
    yield
    native.load_kernels.cache_clear()


def fake_compiler(folder: Path, *, body: str) -> str:
    """Return a script that answers --version and otherwise does `body`; $out is the result."""
    script = folder / "fake-g++"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi\n'
        'for out in "$@"; do :; done\n' + body
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_without_a_compiler_torch_does_the_work_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    x, w_in, w_out = torch.randn(3, 8), torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    end = torch.tensor([1, 3], dtype=torch.int32)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            y, _ = ffn_forward(x, end, w_in, w_out, Activation.relu)
    assert native.load_kernels() is None
    torch.testing.assert_close(y[2], w_out[1] @ (w_in[1] @ x[2]).relu())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler found" in caplog.text


def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = fake_compiler(tmp_path, body="echo first >&2; echo cannot do it >&2; exit 1\n")
    with pytest.raises(RuntimeError, match=r"failed: cannot do it$"):
        build_library(compiler, tmp_path)
    monkeypatch.setattr(native, "find_compiler", lambda: compiler)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    assert native.load_kernels() is None
    assert "cannot do it" in caplog.text
    assert not list(tmp_path.glob("*.part"))


def test_ranks_that_start_together_compile_once(tmp_path: Path) -> None:
    compiler = fake_compiler(
        tmp_path, body=f'echo run >> {tmp_path}/runs; sleep 0.2; echo > "$out"\n'
    )
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: build_library(compiler, tmp_path), range(4)))
    assert len(found) == 1
    assert found.pop().exists()
    assert (tmp_path / "runs").read_text().splitlines() == ["run"]


def test_a_changed_source_gets_a_library_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = fake_compiler(tmp_path, body='echo > "$out"\n')
    first = build_library(compiler, tmp_path)
    sources = tmp_path / "csrc"
    sources.mkdir()
    for source in build.SOURCES.iterdir():
        (sources / source.name).write_bytes(source.read_bytes() + b"\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build_library(compiler, tmp_path) != first


def test_a_library_that_cannot_be_loaded_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = fake_compiler(tmp_path, body='echo not a library > "$out"\n')
    monkeypatch.setattr(native, "find_compiler", lambda: compiler)
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    assert native.load_kernels() is None
    assert "not available" in caplog.text
