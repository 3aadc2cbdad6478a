"""`python -m vllm_ms_models.cli` is `vllm-ms`."""

import sys

from vllm_ms_models.cli import main

sys.exit(main())
