"""`python -m lit_gptdata` is the same as the command `lit-gptdata`."""

from lit_gptdata.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
