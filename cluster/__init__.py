"""What a run stands on: config, object store, journal, run registry, Ray session, job submission, command line."""
