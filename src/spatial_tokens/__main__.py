"""`python -m spatial_tokens`: the `spatial-tokens` command, also from a source tree that is not installed."""

from spatial_tokens.cli import main

raise SystemExit(main())
