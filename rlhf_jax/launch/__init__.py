"""Launching on Cloud TPU: a config and flags become a plan, argument lists and files, that is printed or run. See README.md.

Flow, here: `request` (what is asked for, and what is refused) → `job` (the folder that every machine gets) → one module per backend (the commands)
→ `plan` (data) → `runner`. Flow, there: `run.sh` sets a machine up → `worker` runs the job, restarts it, and reports into the bucket.
"""
