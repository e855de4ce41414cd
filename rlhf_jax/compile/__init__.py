"""What a run's programs need on a machine that is not here: compiled for a named TPU topology by its own compiler, on any Linux CPU.

Flow: `chips` says what a topology is, `outline` assembles the run from shapes, `programs` lists what it compiles, `hlo` reads the compiled text, `costs`
derives operations and bytes, `measure` puts them together, `search` tries meshes, `tables` shows it all. Nothing is executed.
"""
