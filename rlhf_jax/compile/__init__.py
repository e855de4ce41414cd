"""What a run's programs need on a machine that is not here: compiled for a named TPU topology by its own compiler, on any Linux CPU.

Flow: `chips` says what a topology is, `outline` assembles the run from shapes, `programs` lists what it compiles, `hlo` reads the compiled text,
`costs` counts operations, `measure` puts them together, `plan` runs it all, `search` ranks layouts, `tables` shows it. Nothing is executed.
"""
