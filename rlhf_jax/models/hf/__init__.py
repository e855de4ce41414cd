"""Hugging Face directories in and out: config.json, safetensors, and the tables that say which tensor of theirs is which parameter of ours."""
