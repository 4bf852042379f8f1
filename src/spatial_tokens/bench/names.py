"""What a run of the benchmarks can be asked for, by name; needs no torch."""

SUITES = ("limits", "kernels", "factorized", "projectors", "llm", "scaling")  # in the order in which they run
DTYPES = ("float32", "bfloat16", "float16")
