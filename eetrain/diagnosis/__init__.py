"""Is this machine, this job and this folder ready for a run: small checks, each with what to do about it."""
