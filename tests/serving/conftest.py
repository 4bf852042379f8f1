"""What needs vLLM is collected where it is installed: in an environment of its own (`nox -s vllm`)."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("vllm") else ["test_vllm.py", "test_server.py"]
