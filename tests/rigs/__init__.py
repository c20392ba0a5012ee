"""Real servers on a CPU, as test environments: how they are built, started and asked."""
