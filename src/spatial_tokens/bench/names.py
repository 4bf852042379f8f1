"""What a run of the benchmarks can be asked for, by name; needs no torch."""

# The suites in the order in which they run, with estimated minutes on two CPU cores.
MINUTES = {"limits": 1, "kernels": 75, "factorized": 5, "projectors": 2, "llm": 13, "scaling": 14}
SUITES = tuple(MINUTES)
DTYPES = ("float32", "bfloat16", "float16")
