"""The parts of bench_decode_attention: workload, timing, policies, floors, cases, plots."""
