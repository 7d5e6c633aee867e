import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fails(capsys):
    """fails(script, "--flag ...") runs the script's command line, expects exit code 2 and one line, and returns it."""
    import common

    def call(script, command: str, monkeypatch=None) -> str:
        parse = script.parse if hasattr(script, "parse") else script.build_parser().parse_args
        main = script.main if hasattr(script, "main") else lambda args: args.main(args)
        with pytest.raises(SystemExit) as e:
            common.run(main, parse, command.split())
        err = capsys.readouterr().err.strip()
        assert e.value.code == 2, err
        assert len(err.splitlines()) == 1 and "error:" in err, err
        return err

    return call
