"""What of the benchmark of decode steps needs no GPU."""

import sys

import pytest

from tools.bench_decode_adapters import VARIANTS, main


def test_unknown_variant_is_refused_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--variants", "forked;urgent"])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert "got 'urgent'" in told
    assert all(name in told for name in VARIANTS)
