"""What a GPU is asked first: `benchmarks/gpu.sh OUT` runs all steps, `python -m benchmarks.gpu STEP OUT` one.

A step writes its rows one by one, as lines of JSON in OUT/rows/STEP.jsonl, so that a step that is cut off keeps what
it has. With FASTEBM_REHEARSAL=1 every step does the same on the CPU with sizes that take seconds: it shows that a step
runs to its end, and its numbers mean nothing.
"""
