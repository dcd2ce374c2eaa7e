"""Many decode steps at once in plain torch: what a grading costs and loses, without an engine.

Under teacher forcing a step's hidden states depend only on the tokens before it, so all steps of a
passage run side by side, layer by layer. Any grading can be tried, also ones no kernel serves.
"""
