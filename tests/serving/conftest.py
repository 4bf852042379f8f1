"""What needs vLLM is collected where it is installed: in an environment of its own (`nox -s vllm`)."""

import os
from importlib.util import find_spec
from tempfile import mkdtemp

HAS_VLLM = find_spec("vllm") is not None
collect_ignore = ["site", *([] if HAS_VLLM else ["test_vllm.py", "test_server.py"])]

if HAS_VLLM:  # before it is imported
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": mkdtemp(),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
